"""Flax Linen networks."""

from jaxcl.nets.discriminators import PatchDiscriminator
from jaxcl.nets.efficientnet import EfficientNetLite0, efficientnet_lite0_preprocess, load_efficientnet_lite0
from jaxcl.nets.image_tokenizer import ConvDecoder, ConvEncoder, PatchDecoder, PatchEncoder
from jaxcl.nets.mlp import MLP
from jaxcl.nets.resnet import ResNet18
from jaxcl.nets.seanet import SEANetDecoder, SEANetEncoder
from jaxcl.nets.transformer import TokenTransformer

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "EfficientNetLite0",
    "PatchDecoder",
    "PatchDiscriminator",
    "PatchEncoder",
    "ResNet18",
    "SEANetDecoder",
    "SEANetEncoder",
    "TokenTransformer",
    "efficientnet_lite0_preprocess",
    "load_efficientnet_lite0",
]
