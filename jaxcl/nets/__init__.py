"""Flax Linen networks."""

from jaxcl.nets.alexnet import AlexNet
from jaxcl.nets.batch_norm import BatchNorm, batch_statistics, layer_outputs
from jaxcl.nets.bert import BERT, BERTLayers, load_bert, mean_over_tokens, minilm_folder
from jaxcl.nets.convmixer import ConvMixer, load_convmixer
from jaxcl.nets.discriminators import PatchDiscriminator
from jaxcl.nets.efficientnet import EfficientNetLite0, efficientnet_lite0_preprocess, load_efficientnet_lite0
from jaxcl.nets.encoders import FrozenEncoder, efficientnet_lite0_encoder, minilm_encoder, pretrained_encoder
from jaxcl.nets.generation import greedy_decode
from jaxcl.nets.image_tokenizer import ConvDecoder, ConvEncoder, PatchDecoder, PatchEncoder
from jaxcl.nets.interception import through_layers
from jaxcl.nets.lenet import LeNet5
from jaxcl.nets.llama import Llama, RotaryScaling, load_llama
from jaxcl.nets.mixer import Mixer
from jaxcl.nets.mlp import MLP
from jaxcl.nets.pooling import max_pool_2x2
from jaxcl.nets.resnet import ResNet18
from jaxcl.nets.resnet50 import ResNet50, load_resnet50
from jaxcl.nets.seanet import SEANetDecoder, SEANetEncoder
from jaxcl.nets.t5 import T5, load_t5, save_t5
from jaxcl.nets.text_to_text import NO_TOKEN, real_tokens, text_to_text
from jaxcl.nets.transformer import TokenTransformer
from jaxcl.nets.vgg import VGG16
from jaxcl.nets.vit import ViT, load_vit

__all__ = [
    "BERT",
    "MLP",
    "NO_TOKEN",
    "T5",
    "VGG16",
    "AlexNet",
    "BERTLayers",
    "BatchNorm",
    "ConvDecoder",
    "ConvEncoder",
    "ConvMixer",
    "EfficientNetLite0",
    "FrozenEncoder",
    "LeNet5",
    "Llama",
    "Mixer",
    "PatchDecoder",
    "PatchDiscriminator",
    "PatchEncoder",
    "ResNet18",
    "ResNet50",
    "RotaryScaling",
    "SEANetDecoder",
    "SEANetEncoder",
    "TokenTransformer",
    "ViT",
    "batch_statistics",
    "efficientnet_lite0_encoder",
    "efficientnet_lite0_preprocess",
    "greedy_decode",
    "layer_outputs",
    "load_bert",
    "load_convmixer",
    "load_efficientnet_lite0",
    "load_llama",
    "load_resnet50",
    "load_t5",
    "load_vit",
    "max_pool_2x2",
    "mean_over_tokens",
    "minilm_encoder",
    "minilm_folder",
    "pretrained_encoder",
    "real_tokens",
    "save_t5",
    "text_to_text",
    "through_layers",
]
