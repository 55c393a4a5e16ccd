"""Folders of images: what is read, how it is fitted to a size, and what is refused."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxcl import data


def some_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(some_pixels(4, 4, 3) if pixels is None else pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes with two and one training images, and one test image of the second."""
    write(tmp_path / "train/cat/2.png", some_pixels(4, 6, 3, seed=2))
    write(tmp_path / "train/cat/1.png", some_pixels(4, 6, 3, seed=1))
    write(tmp_path / "train/ant/1.png", some_pixels(4, 6, 3, seed=0))
    write(tmp_path / "test/cat/7.png", some_pixels(4, 6, 3, seed=7))
    return tmp_path


def test_images_stand_in_order_of_class_and_name(folder):
    train, test = data.image_folder(folder, size=(4, 6))
    np.testing.assert_array_equal(train.labels, [0, 1, 1])
    np.testing.assert_array_equal(test.labels, [1])
    assert train.labels.dtype == test.labels.dtype == np.int32
    assert train.inputs.shape == (3, 4, 6, 3) and test.inputs.shape == (1, 4, 6, 3)
    assert train.inputs.dtype == np.uint8 and len(train.inputs) == 3
    expected = np.stack([some_pixels(4, 6, 3, seed=seed) for seed in (2, 0, 1, 2)])
    np.testing.assert_array_equal(train.inputs[np.array([2, 0, 1, 2])], expected)
    np.testing.assert_array_equal(test.inputs[np.array([0])][0], some_pixels(4, 6, 3, seed=7))
    assert train.inputs[np.array([], int)].shape == (0, 4, 6, 3)


def test_the_path_may_be_a_string_and_dotted_names_are_left_out(folder):
    (folder / "train/.DS_Store").write_bytes(b"x")
    (folder / "train/cat/.3.png").write_bytes(b"x")
    assert len(data.image_folder(str(folder), size=(2, 2)).train.labels) == 3


@pytest.mark.parametrize("ending", ["png", "bmp", "jpg", "jpeg", "webp", "PNG", "Jpg"])
def test_every_kind_of_file_is_read(folder, ending):
    flat = np.full((8, 8, 3), (40, 90, 200), np.uint8)
    write(folder / f"test/ant/1.{ending}", flat)
    test = data.image_folder(folder, size=(8, 8)).test
    np.testing.assert_allclose(test.inputs[np.array([0])][0].astype(int), flat, atol=3)  # jpeg and webp are lossy


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(folder, mode):
    image = Image.new(mode, (4, 4), 1 if mode in ("1", "P") else None)
    if mode == "RGBA":
        image = Image.new(mode, (4, 4), (10, 20, 30, 40))
    path = folder / ("test/ant/1.jpg" if mode == "CMYK" else "test/ant/1.png")
    path.parent.mkdir()
    image.save(path)
    pixels = data.image_folder(folder, size=(4, 4)).test.inputs[np.array([0])]
    assert pixels.shape == (1, 4, 4, 3)
    if mode == "RGBA":
        np.testing.assert_array_equal(pixels[0, 0, 0], [10, 20, 30])


@pytest.mark.parametrize(("given", "size"), [((4, 12), (4, 4)), ((12, 4), (4, 4)), ((8, 16), (2, 4)), ((2, 2), (6, 4))])
def test_an_image_is_scaled_until_it_covers_and_cut_evenly(folder, given, size):
    # Bars across the longer side: what is cut off at both ends is black, the rest has one colour.
    pixels = np.full((*given, 3), 200, np.uint8)
    scale = max(size[0] / given[0], size[1] / given[1])
    for axis in (0, 1):
        cut = round((given[axis] - size[axis] / scale) / 2)
        places = np.arange(given[axis])
        outside = (places < cut) | (places >= given[axis] - cut)
        pixels[outside if axis == 0 else (slice(None), outside)] = 0
    write(folder / "test/ant/1.png", pixels)
    fitted = data.image_folder(folder, size=size).test.inputs[np.array([0])]
    np.testing.assert_array_equal(fitted, np.full((1, *size, 3), 200))


def test_scaling_down_averages(folder):
    write(folder / "test/ant/1.png", np.tile(np.array([[0, 200], [200, 0]], np.uint8), (8, 8)))
    fitted = data.image_folder(folder, size=(4, 4)).test.inputs[np.array([0])]
    np.testing.assert_allclose(fitted.astype(int), 100, atol=12)


def test_many_threads_and_other_processes_may_read(folder):
    inputs = data.image_folder(folder, size=(4, 6)).train.inputs
    expected = inputs[np.arange(3)]
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda row: inputs[np.array([row % 3])], range(60)))
    for row, batch in enumerate(batches):
        np.testing.assert_array_equal(batch[0], expected[row % 3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(inputs))[np.arange(3)], expected)


@pytest.mark.parametrize("whole", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
def test_a_damaged_file_is_named_when_it_is_asked_for(folder, whole):
    path = folder / "train/cat/1.png"
    path.write_bytes(path.read_bytes()[:60] if whole is None else whole)
    inputs = data.image_folder(folder, size=(4, 4)).train.inputs
    assert inputs[np.array([0, 2])].shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"image file: got .*train.cat.1.png; repair or remove it"):
        inputs[np.array([0, 1])]


def test_sixteen_bits_are_refused_not_cut(folder):
    write(folder / "test/ant/1.png", np.full((4, 4), 30000, np.uint16))
    inputs = data.image_folder(folder, size=(4, 4)).test.inputs
    with pytest.raises(ValueError, match=r"image file: got .*1.png; repair .*mode I;16; reduce it to 8 bits"):
        inputs[np.array([0])]


def test_a_row_that_is_not_there_is_an_index_error(folder):
    with pytest.raises(IndexError):
        data.image_folder(folder, size=(4, 4)).train.inputs[np.array([3])]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "test").rename(path / "tests"), r"path: got .*test; it must be a folder: <path>/"),
        (lambda path: (path / "train").rename(path / "t"), r"path: got .*train; it must be a folder: <path>/"),
        (lambda path: (path / "train/dog").mkdir(), r"path: got .*dog; the folder is empty: fill or remove it"),
        (lambda path: (path / "test/cat/7.png").rename(path / "7.png"), r"path: got .*cat; the folder is empty"),
        (lambda path: write(path / "test/dog/1.png"), r"class folder in .*test: got 'dog'; choose one of 'ant', 'cat'"),
        (lambda path: (path / "train/cat/notes.txt").touch(), r"path: got .*notes.txt; only .bmp, .* may lie there"),
        (lambda path: (path / "train/cat/more").mkdir(), r"path: got .*more; only .bmp, .* may lie there: move it"),
        (lambda path: write(path / "train/1.png"), r"path: got .*1.png; it must be a folder: <path>/<train or test>"),
        (lambda path: write(path / "test/1.png"), r"class folder in .*test: got '1.png'; choose one of 'ant', 'cat'"),
    ],
    ids=["no test", "no train", "no image", "no test image", "unknown", "text", "nested", "stray", "stray in test"],
)  # fmt: skip
def test_a_folder_that_is_not_as_it_should_be_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        data.image_folder(folder, size=(4, 4))


@pytest.mark.parametrize(("size", "message"), [((4,), r"size: got \(4,\); pass \(h"), ((4, 0), r"size: got 0; pass 1")])
def test_a_size_that_is_none_is_refused(folder, size, message):
    with pytest.raises(ValueError, match=message):
        data.image_folder(folder, size=size)


def test_missing_pillow_says_what_brings_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'Pillow: pip install "jaxcl\[data\]"'):
        data.image_folder(folder, size=(4, 4))


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path):
    """Two classes, as distributed: the second in alphabetical order comes first in the list."""
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    for number, name in enumerate(("n01", "n02")):
        for image in range(2):
            write(tmp_path / f"train/{name}/images/{name}_{image}.JPEG", np.full((64, 64, 3), 40 * number, np.uint8))
        (tmp_path / f"train/{name}/{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    for number, name in enumerate(("n02", "n01", "n01")):
        pixels = np.full((64, 64), 40 * number, np.uint8)  # as some are, without colours
        write(tmp_path / f"val/images/val_{number}.JPEG", pixels)
        with (tmp_path / "val/val_annotations.txt").open("a") as file:
            file.write(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    write(tmp_path / "test/images/test_0.JPEG")
    return tmp_path


def test_tiny_imagenet_is_read_as_it_is_distributed(tiny):
    train, test = data.tiny_imagenet(tiny)
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(test.labels, [0, 1, 1])
    assert train.labels.dtype == np.int32 and train.inputs.dtype == np.uint8
    assert train.inputs.shape == (4, 64, 64, 3) and test.inputs.shape == (3, 64, 64, 3)
    np.testing.assert_allclose(train.inputs[np.arange(4)][:, 0, 0, 0], [40, 40, 0, 0], atol=2)
    np.testing.assert_allclose(test.inputs[np.arange(3)][:, 5, 5].astype(int), [[0] * 3, [40] * 3, [80] * 3], atol=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "wnids.txt").unlink(), r"path: got .*wnids.txt; it must be a text file of Tiny ImageNet"),
        (lambda path: (path / "wnids.txt").write_text("\n"), r"path: got .*wnids.txt; the file is empty"),
        (lambda path: (path / "wnids.txt").write_bytes(b"\xff"), r"path: got .*wnids.txt; it must be a text file"),
        (lambda path: (path / "wnids.txt").write_text("n03\n"), r"path: got .*images; it must be a folder"),
        (lambda path: (path / "val/val_annotations.txt").write_text("val_0.JPEG\n"), "line 1: 'val_0.JPEG'; copy"),
        (lambda path: (path / "val/val_annotations.txt").write_text("../a.JPEG\tn01\n"), "line 1: '../a.JPEG"),
        (lambda path: (path / "val/val_annotations.txt").write_text("val_0.JPEG\tn09\n"), "line 1: 'val_0.JPEG"),
    ],
    ids=["no list", "empty list", "no text", "class without images", "no class", "elsewhere", "unknown class"],
)  # fmt: skip
def test_a_tiny_imagenet_that_is_not_as_distributed_is_refused(tiny, spoil, message):
    spoil(tiny)
    with pytest.raises(ValueError, match=message):
        data.tiny_imagenet(tiny)


def test_an_annotated_image_that_is_missing_is_named_when_it_is_asked_for(tiny):
    (tiny / "val/images/val_1.JPEG").unlink()
    inputs = data.tiny_imagenet(tiny).test.inputs
    with pytest.raises(ValueError, match=r"image file: got .*val_1.JPEG; repair or remove it"):
        inputs[np.array([1])]
