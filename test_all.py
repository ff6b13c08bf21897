"""All tests: oracles, closed forms, invariants, bad input; real runs that are killed, resumed and split.

    python test_all.py            # everything, offline, half a minute on two quiet cores
    python test_all.py nce mask   # only tests whose name contains one of these words

Collected by pytest, too, but for those of a GPU. The last line is "N passed, N failed".
"""

import argparse
import atexit
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fid
import losses
import model
import probe
import sample
import tokenizer
import train

HERE = Path(__file__).resolve().parent


# ---- What the tests share ----------------------------------------------------------------------------------

def scratch():
    """A new, empty folder, removed when the tests end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def close(what, seen, expected, tolerance=1e-5):
    """Assert that numbers or tensors agree, absolutely or relatively; the message shows the worst place."""
    seen, expected = (torch.as_tensor(value).detach().double() for value in (seen, expected))
    assert seen.shape == expected.shape, f"{what}: seen {seen.shape}, expected {expected.shape}"
    apart = ((seen - expected).abs() / (1 + expected.abs())).nan_to_num(math.inf).flatten()
    a, b = seen.flatten()[apart.argmax()], expected.flatten()[apart.argmax()]
    assert apart.max() <= tolerance, f"{what}: seen {a:.6g}, expected {b:.6g}"


def refuses(words, call, *args, **kwargs):
    """Assert that call(...) raises what a script ends with, in one line that contains all `words`."""
    try:
        call(*args, **kwargs)
    except (ValueError, OSError, SystemExit) as caught:
        text = str(caught)
        assert text and "\n" not in text and all(word in text for word in words.split()), (words, text)
    else:
        raise AssertionError(f"{call.__name__} did not refuse {args}: {words}")


def heard(call, *args, **kwargs):
    """What call(...) prints, progress bars included; a SystemExit then carries the last line of it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            call(*args, **kwargs)
    except SystemExit:
        raise SystemExit(said.getvalue().splitlines()[-1]) from None
    return said.getvalue()


def words_for_cpu(argv):
    """A command line as words; on a CPU, unless it names a device."""
    words = list(map(str, argv))
    return words if "--device" in words else [*words, "--device", "cpu"]


def run(main, *argv):
    """`heard` of a script's main with these arguments, in this process and in the workshop."""
    place = os.getcwd()
    os.chdir(workshop())
    try:
        return heard(main, words_for_cpu(argv))
    finally:
        os.chdir(place)


PATIENCE = 300  # seconds for a launched script to do what a quiet machine does in ten


def launch(script, *argv, processes=1, folder=None):
    """Start a script in the workshop or a folder, as so many processes; none outlives the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started, command = [], [sys.executable, HERE / script, *words_for_cpu(argv)]
    for rank in map(str, range(processes)):  # as torchrun would, which takes longer
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes), RANK=rank,
                     LOCAL_RANK=rank, OMP_NUM_THREADS="1")
        started.append(subprocess.Popen(command, cwd=folder or workshop(), env=os.environ | place, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        atexit.register(started[-1].kill)  # nothing happens if it has ended
    return started


def finish(processes, enough=None):
    """Whether launched processes come to their end, as they must, well and in time; `enough()` kills them."""
    end = time.time() + PATIENCE
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        assert time.time() < end, "it takes too long"
        if enough and enough():
            for process in processes:
                process.kill()
                process.wait()
            return False
        time.sleep(0.01)
    assert not any(codes), "".join(process.stderr.read()[-2000:] for process in processes if process.poll())
    return True


def refuses_all(main, table, *before):
    """For each line of `table`, "words | arguments": main refuses `before` and the arguments, so worded."""
    for line in table.strip().splitlines():
        words, _, arguments = line.partition("|")
        refuses(words, run, main, *before, *arguments.split())


@contextlib.contextmanager
def replaced(*paths):
    """Assert that new files take the place of these meanwhile: none is written in place, and so torn."""
    before = [path.stat().st_ino for path in paths]
    yield
    for path, old in zip(paths, before):
        assert path.stat().st_ino != old, f"{path} was written in place"


def tiny_model(seed=0, **changes):
    """A model of 3 layers on a 4 x 4 grid, with a random head, so that logits say something."""
    torch.manual_seed(seed)
    config = dict(n_layer=3, n_head=2, dim=32, vocab_size=11, num_classes=5, num_tokens=16, dropout=0.0)
    net = model.Transformer(model.ModelConfig(**config | changes)).eval()
    for p in net.parameters():  # far larger than 0.02: attention that is not flat, logits that differ
        p.data += 0.2 * torch.randn_like(p) * (p.ndim > 1)
    return net


def some_tokens(batch=3, count=15, vocab=11):
    g = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (batch, count), generator=g), torch.randint(5, (batch,), generator=g)


def write_images(root, classes=4, each=12):
    """root/<class>/<i>.png of the built-in shapes."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(each):
            tokenizer.draw_shape(label, (0, label, i), 32).save(root / f"class{label}" / f"{i:02d}.png")


VQ_64 = replace(tokenizer.VQ_DS4, codebook_size=64)


@lru_cache(maxsize=1)
def workshop():
    """A folder with 48 images in 4 classes and a barely trained tokenizer, made once for all tests."""
    root = scratch()
    write_images(root / "images")
    vq = tokenizer.train_tokenizer(tokenizer.open_images(root / "images"), 16, VQ_64, steps=60, batch=8)
    tokenizer.save_tokenizer(root / "vq.pt", vq)
    return root


def our_images(split="train"):
    """The workshop's images: 44 to train on, 4 held out."""
    return tokenizer.open_images(workshop() / "images", split)


def our_vq():
    """The workshop's tokenizer: 64 codes, each for 4 x 4 pixels."""
    return tokenizer.load_tokenizer(workshop() / "vq.pt")


def with_unreadable(*bad):
    """132 images, of which those numbered in `bad` cannot be read."""
    images = our_images()

    def read(i):
        return tokenizer.decode_image(b"", f"{i}.png") if i in bad else images.read(i % 44)
    return replace(images, names=images.names * 3, labels=np.tile(images.labels, 3), read=read)


TINY = ["--preset", "nano", "--image-size", "16", "--batch", "8", "--dropout", "0", "--warmup", "0",
        "--log-every", "1", "--eval-images", "4", "--samples", "2", "--seed", "7"]
SMALL = [*TINY, "--data", "images", "--tokenizer", "vq.pt"]


@lru_cache(maxsize=1)
def trained_run():
    """A run folder of one training step, made once: runs/trained in the workshop."""
    run(train.main, *SMALL, "--name", "trained", "--steps", 1)
    return workshop() / "runs" / "trained"


def checkpoint(name):
    """The checkpoint of a run: a name in the workshop, or a path."""
    return torch.load(workshop() / "runs" / name / "checkpoint.pt", weights_only=True)


def altered(path, **changes):
    """A file of weights with some entries changed: a copy, in a new folder with the files beside it."""
    folder = scratch()
    for file in path.parent.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    torch.save(torch.load(path, weights_only=True) | changes, folder / path.name)
    return folder / path.name


def metrics(name):
    path = workshop() / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(a, b):
    """Bit-identical trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return same(sorted(a.items()), sorted(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- tokenizer.py ------------------------------------------------------------------------------------------

def pack(folder, path, top=""):
    """All files of a folder in a zip, below `top`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def splits(source, subset=""):
    return [tokenizer.open_images(source, split, subset) for split in ("train", "val")]


def tiny_imagenet(root):
    """Two classes of two images in Tiny ImageNet's layout, and two held-out images of 20 x 30 pixels."""
    write_images(root / "train", classes=2, each=2)
    (root / "val" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("CMYK", (20, 30)).save(root / "val" / "images" / f"v{i}.JPEG")
    lines = [f"v{i}.JPEG\tclass{1 - i}\t0\t0\t9\t9\n" for i in range(2)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("class0\tgoldfish, Carassius\nclass1\tlion\n\nno tab\n")
    return root


def test_reader_layouts():
    """Class folders, train and val however they are spelt and nested, Tiny ImageNet as a folder or a zip."""
    root = scratch()
    write_images(root / "plain")
    train_set, val = splits(root / "plain")
    assert len(train_set) == 44 and not set(train_set.names) & set(val.names)
    assert val.labels.tolist() == [0, 1, 2, 3]
    (root / "list.txt").write_bytes(b"\xef\xbb\xbfclass3\r\n\r\n class1 \r\nclass3")  # as Windows writes it
    few, _ = splits(root / "plain", root / "list.txt")
    assert few.classes == ["class1", "class3"] and len(few) == 22
    Image.new("RGB", (7, 5)).save(root / "plain" / train_set.names[0])  # another image, another fingerprint
    assert splits(root / "plain")[0].fingerprint != train_set.fingerprint
    for names in (("Train", "Val"), ("training/training", "testing/testing")):  # the second from Kaggle
        for name, each in zip(names, (3, 2)):
            write_images(root / names[0] / "around" / name, each=each)
        assert list(map(len, splits(root / names[0]))) == [12, 8], names
    folder = tiny_imagenet(root / "tiny")
    for source in (folder, pack(folder, root / "tiny.zip", "./t/")):
        val = tokenizer.open_images(source, "val")
        assert val.classes == ["goldfish", "lion"] and val.labels.tolist() == [1, 0]
        assert val.read(0).mode == "RGB" and val.read(0).size == (20, 30)


def test_reader_is_not_fooled():
    """Nothing that lies where it cannot be used is passed over in silence."""
    root, classes = scratch(), workshop() / "images"
    for words, folders in (("12 images val/ sort", ["train/class0", "train/class1", "val"]),
                           ("class 'class2' no training", ["train/class0", "train/class1", "val/class2"]),
                           ("train and val class folders", ["train", "val"]),
                           ("images in val", ["train/images/cat", "train/images/dog", "val/images"]),
                           ("test class folders", ["cat", "dog", "test"]),
                           ("A trainA", ["trainA/cat", "testA/cat", "valley"]),
                           ("Set test train", ["one/train/cat", "one/testSet", "two/test/cat"])):
        for folder in folders:
            shutil.copytree(classes / "class0", root / words[:5] / folder)
        refuses(words, tokenizer.open_images, root / words[:5])
    shutil.copytree(classes, root / "wrapped" / "data")
    shutil.copy(next(classes.rglob("*.png")), root / "wrapped" / "preview.png")  # would make data/ a class
    refuses("beside the folder data/", tokenizer.open_images, root / "wrapped")
    write_images(root / "single", each=1)
    refuses("one image of each class", tokenizer.open_images, root / "single")
    (root / "half.zip").write_bytes(b"PK\3\4 and then the connection broke")
    refuses("half.zip complete zip", tokenizer.open_images, root / "half.zip")


def test_pictures_are_upright():
    """As their EXIF says; what is no picture, or could run a program, is refused by its name."""
    picture, lying, file = Image.new("RGB", (16, 8)), Image.Exif(), io.BytesIO()
    picture.paste("white", (0, 0, 8, 8))  # on the left
    lying[0x0112] = 6  # to be turned by 90 degrees to the right: white on top
    picture.save(file, "JPEG", exif=lying)
    turned = np.asarray(tokenizer.decode_image(file.getvalue(), "x"))
    assert turned.shape == (16, 8, 3) and turned[:7].min() > 240 and turned[9:].max() < 15
    broken = io.BytesIO()
    picture.save(broken, "PNG", exif=bytes([0, 8, 0, 2, 1, 18, 0, 3]))  # cannot be read; the pixels can
    assert tokenizer.decode_image(broken.getvalue(), "x").size == (16, 8)
    refuses("x.eps readable image", tokenizer.decode_image, b"%!PS-Adobe-3.0 EPSF-3.0\n", "x.eps")


def test_unreadable_images_are_left_out_and_told():
    images, found = with_unreadable(3), []
    said = heard(lambda: found.append(tokenizer.token_cache(images, our_vq(), 16, (), scratch())))
    assert np.flatnonzero(found[0].labels < 0).tolist() == [3]
    assert "1 train images are left out" in said and images.names[3] in said
    refuses("1 % of the 132 images", tokenizer.read_pixels, with_unreadable(3, 7), range(9),
            np.asarray)


def test_shapes_are_a_function_of_their_index():
    a, b = tokenizer.open_images("shapes"), tokenizer.open_images("shapes")
    assert np.array_equal(a.read(17), b.read(17)) and not np.array_equal(a.read(17), a.read(29))
    assert not np.array_equal(a.read(0), tokenizer.open_images("shapes", "val").read(0))


def test_crops():
    """LlamaGen's ten; the centre of wide and of tall images; ADM halves large ones by means of 2 x 2."""
    p = np.random.default_rng(0).integers(256, size=(281, 281, 3), dtype=np.uint8)
    crops = tokenizer.ten_crops(Image.fromarray(p), 256, 1.1)
    assert crops.shape == (10, 256, 256, 3)
    for crop, (y, x) in zip(crops, ((0, 0), (0, 25), (25, 0), (25, 25), (12, 12))):  # 12.5 is rounded to even
        assert np.array_equal(crop, p[y:y + 256, x:x + 256])
    assert np.array_equal(crops[5], crops[1][:, ::-1])  # crops of the mirror image, not mirrored crops:
    assert not np.array_equal(crops[9], crops[4][:, ::-1])  # with an odd margin the centres differ
    assert np.array_equal(tokenizer.center_crop(Image.fromarray(p[:70]), 70), p[:70, 105:175])
    assert np.array_equal(tokenizer.center_crop(Image.fromarray(p[:, :70]), 70), p[105:175, :70])
    halved = np.asarray(tokenizer.center_crop(Image.fromarray(p[:64, :64]), 32), float)
    assert abs(halved - p[:64, :64].reshape(32, 2, 32, 2, 3).mean((1, 3))).max() <= 1


def test_pixels_to_float_and_back():
    """0 and 255 are -1 and 1; the way back is LlamaGen's: times 127.5, plus 128, truncated."""
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    close("float", tokenizer.to_float(pixels).flatten(), [-1, -0.6, 1])
    ends = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2)
    assert tokenizer.to_uint8(ends).flatten().tolist() == [0, 128, 255, 255]


def test_quantizer_by_hand():
    """Nearest codes, a straight-through gradient, and 0.25 on the commitment, not on the codebook loss."""
    torch.manual_seed(0)
    quantize = tokenizer.VectorQuantizer(tokenizer.VQConfig(codebook_size=50))
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    z_q, indices, loss = quantize(z)
    unit, codes = F.normalize(z, dim=1), quantize.codebook()
    for b, t in np.ndindex(2, 9):
        v = unit[b, :, t // 3, t % 3]
        assert indices[b, t] == min(range(50), key=lambda n: (v - codes[n]).square().sum().item())
        close("z_q", z_q[b, :, t // 3, t % 3], codes[indices[b, t]])
    chosen = codes[indices].movedim(-1, 1).view_as(unit)
    commitment = 0.25 * (unit - chosen.detach()).square().mean()
    codebook = (unit.detach() - chosen).square().mean()
    close("loss", loss, codebook + commitment)
    for what, part, by in (("commitment", commitment, z), ("codebook", codebook, quantize.embedding.weight)):
        seen, expected = (torch.autograd.grad(x, by, retain_graph=True)[0] for x in (loss, part))
        close(f"gradient of the {what} loss", 100 * seen, 100 * expected)
    weight = torch.randn_like(z_q)
    through, direct = (torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (z_q, unit))
    close("straight through", through, direct)


def test_golden_numbers_of_the_vq_model():
    """Once compared with LlamaGen's own code (vq_model.py): equal codes, pixels to 4e-6."""
    vq = tokenizer.VQModel(tokenizer.VQConfig(codebook_size=50, ch=32, ch_mult=(1, 2), z_channels=16)).eval()
    for i, (name, p) in enumerate(sorted(vq.named_parameters())):
        wave = (torch.arange(p.numel(), dtype=torch.float64) ** 2 * (i + 1.7)).sin().float().view_as(p)
        p.data = wave * math.sqrt(2 / p[0].numel()) if p.ndim > 1 else 0.1 * wave
        if p.ndim == 1 and name.endswith("weight"):
            p.data = 1 + 3 * p
    x = (torch.arange(3 * 16 * 16, dtype=torch.float64) ** 2 * 0.37).sin().float().view(1, 3, 16, 16)
    codes = vq.encode(x)
    assert codes[0, :12].tolist() == [7, 46, 24, 45, 34, 43, 45, 45, 33, 43, 1, 16]
    golden = torch.tensor([[0.08447, -0.67135, -0.05025], [-0.09860, 0.82222, -0.29477],
                           [0.03437, 0.72788, -0.19942]])
    close("pixels", vq.decode(codes)[0][:, [0, 7, 15], [3, 8, 14]], golden, 1e-4)


def test_quality_by_hand():
    """Errors of 0.1 and, after clamping, of 0.498 of the range; two codes alike are a perplexity of 2."""
    class Grey(torch.nn.Linear):
        config = tokenizer.VQConfig(codebook_size=8)

        def encode(self, x):
            return (x[:, 0].flatten(1) > 0).long() + 3

        def decode(self, codes):  # black as -0.8, grey as far too white
            return torch.where(codes > 3, 5.0, -0.8).view(-1, 1, 4, 4).expand(-1, 3, 4, 4)

    black_and_grey = torch.tensor([0, 128], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    quality = tokenizer.evaluate_tokenizer(Grey(1, 1), black_and_grey)
    close("PSNR", quality["psnr"], (20 - 20 * math.log10(127 / 255)) / 2)
    close("usage", quality["usage"], 2 / 8)
    close("perplexity", quality["perplexity"], 2)


def test_crops_for_training_are_upright():
    """Coloured below on the left: cut, mirrored from left to right, never upside down, with their labels."""
    root = scratch()
    for name in ("blue", "red"):
        picture = Image.new("RGB", (40, 40), "white")
        picture.paste(name, (0, 20, 20, 40))
        (root / name).mkdir()
        for i in range(3):
            picture.save(root / name / f"{i}.png")
    crops, sides = tokenizer.Crops(tokenizer.open_images(root), 36, 0, "cpu"), set()
    for _ in range(20):
        x, labels = crops.draw(4)  # (4, 3, 36, 36)
        assert x[:, :, :12].min() > 0.9
        for image, label in zip(x, labels.tolist()):
            dark = image[2 * label, -1] < -0.9  # in the lowest row: no red where it is blue, or no blue
            assert 10 < dark.sum() < 26 and image[2 - 2 * label].min() > 0.9
            sides.add(dark[0].item())
    assert sides == {True, False}


def test_dead_codes_are_restarted():
    """At a learning rate of zero many more codes are then used (else 7 %); the others stay."""
    quantize = tokenizer.VectorQuantizer(tokenizer.VQConfig(codebook_size=10))
    before = quantize.embedding.weight.clone()
    quantize.restart(torch.arange(10) >= 7, torch.randn(20, 8))
    assert (quantize.embedding.weight == before).all(1).tolist() == [True] * 7 + [False] * 3
    vq = tokenizer.train_tokenizer(our_images(), 16, replace(VQ_64, codebook_size=256), 2, 16, lr=0.0)
    pixels = tokenizer.held_out_pixels(our_images(), 16, 44)
    assert tokenizer.evaluate_tokenizer(vq, pixels)["usage"] > 0.3


def test_tokenizer_learns():
    """60 steps on 44 images: clearly better than grey, with several codes in use."""
    vq, pixels = our_vq(), tokenizer.held_out_pixels(our_images("val"), 16, 10)
    grey = (pixels.float() / 255 - 0.5).square().flatten(1).mean(1)
    quality = tokenizer.evaluate_tokenizer(vq, pixels)
    assert quality["psnr"] > -10 * grey.log10().mean() + 1 and quality["perplexity"] > 1
    made, codes, _ = vq(tokenizer.to_float(pixels))
    assert torch.equal(codes, tokenizer.encode_pixels(vq, pixels))
    close("decoded", vq.decode(codes), made)


def test_how_the_tokenizer_is_trained():
    """The perceptual loss by hand, and that it counts; the rate rises for 5 % of the steps, then falls."""
    a, b = torch.eye(3)[:2].view(2, 1, 3, 1, 1)  # images (1, 3, 1, 1)
    assert tokenizer.perceptual_loss(lambda x: ([x, 5 * x], None), 2 * a, b) == 2  # at right angles
    assert tokenizer.perceptual_loss(lambda x: ([x, 5 * x], None), 2 * a, a) == 0
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    with patch.object(tokenizer, "perceptual_loss", lambda net, made, x: 10 * (1 - made).mean()):  # whiter
        vq = tokenizer.train_tokenizer(our_images(), 16, VQ_64, steps=40, batch=8, lr=2e-3)
    hook.remove()
    assert vq(tokenizer.to_float(tokenizer.held_out_pixels(our_images(), 16, 10)))[0].mean() > 1
    cosine = [(1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    close("learning rates", rates[-40:], [1e-3, *(2e-3 * share for share in cosine[1:])], 1e-9)


def test_cache_by_any_number_of_processes():
    """Each row holds its image's crops; a killed encoding goes on; two processes share the work."""
    vq, images, place = our_vq(), our_images(), scratch()

    def encode(name, unreadable=()):  # the process is killed where it comes to one of these images
        def read(i):
            if i in unreadable:
                raise SystemExit("killed")
            return images.read(i)
        return tokenizer.token_cache(replace(images, read=read), vq, 16, (1.1, 1.05), place / name)

    one = encode("one")
    assert np.array_equal(one.labels, images.labels)
    crop = torch.from_numpy(tokenizer.ten_crops(images.read(5), 16, 1.05)[7])
    assert np.array_equal(one.tokens[5, 17], vq.encode(tokenizer.to_float(crop[None]))[0])
    with patch.object(tokenizer, "PART_IMAGES", 10):
        refuses("killed", encode, "two", range(25, 44))
        assert np.array_equal(one.tokens, encode("two", range(20)).tokens)  # nothing is done twice
        with patch.dict(os.environ, RANK="1", WORLD_SIZE="2"):
            second = threading.Thread(target=encode, args=["three"])  # encodes its share, then waits
            second.start()
            time.sleep(0.1)
        assert np.array_equal(one.tokens, encode("three").tokens)
        second.join(PATIENCE)


def test_tokenizer_files_of_another_kind():
    state = our_vq().state_dict()
    for words, changes in (("nan", {"quant_conv.bias": torch.full((8,), math.nan)}),
                           ("surprise", {"surprise": torch.ones(3)})):
        path = altered(workshop() / "vq.pt", model=state | changes)
        refuses(words, tokenizer.load_tokenizer, path)


def test_written_whole_or_not_at_all():
    """An older file stays until the new one is there."""
    path = scratch() / "there" / "x"
    tokenizer.write_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new one")
        file.flush()
        assert path.read_bytes() == b"old"
        raise OSError(28, "No space left on device")

    refuses("cannot write No space left", tokenizer.write_file, path, fail)
    assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]
    with replaced(path):
        tokenizer.write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_downloads_are_checked():
    source, path = scratch() / "there", scratch() / "here"
    source.write_bytes(b"abc")
    refuses("not the 3 expected", tokenizer.download, source.as_uri(), path, 3, "md5:0")
    assert not path.exists()
    tokenizer.download(source.as_uri(), path, 3, "md5:900150983cd24fb0d6963f7d28e17f72")
    assert path.read_bytes() == b"abc"


def test_machines_that_are_not_at_hand():
    """Windows: slashes in names, no mapped weights. A GPU that torch was not built for. A batch job's log."""
    names, relpath, log = our_images().names, os.path.relpath, io.StringIO()
    with patch.object(os, "sep", "\\"), patch.object(
            os.path, "relpath", lambda *paths: relpath(*paths).replace("/", "\\")):
        assert our_images().names == names
    with patch.object(tokenizer, "os", argparse.Namespace(name="nt")), patch.object(
            torch, "load", return_value={}) as load:  # Windows could not replace the file
        tokenizer.read_weights(workshop() / "vq.pt")
    assert load.call_args.kwargs["mmap"] is False
    old_gpu = dict(is_available=lambda: True, device_count=lambda: 1, set_device=lambda number: None,
                   get_device_name=lambda number: "Tesla P100")
    with patch.multiple(torch.cuda, **old_gpu), patch.object(
            torch, "ones", side_effect=RuntimeError("no kernel image is available\nand advice")):
        refuses("Tesla P100 --device cpu (no kernel image", tokenizer.choose_device, "")
    with contextlib.redirect_stderr(log):
        for _ in tokenizer.progress(range(3)):
            time.sleep(0.11)
    assert log.getvalue().count("\r") == 2  # the first and the last state, not each tenth of a second


def test_tokenizer_script():
    root, train_it = workshop(), ["train", "--image-size", 16, "--steps", 2, "--batch", 2, "--data"]
    (root / "new.pt").write_text("old")
    with replaced(root / "new.pt"):
        said = run(tokenizer.main, *train_it, "images", "--out", "new.pt")
    assert "44 training and 4 held-out images of 4 classes" in said and "new.pt: PSNR" in said
    assert tokenizer.load_tokenizer(root / "new.pt").config.codebook_size == 1024
    pack(root / "images", root / "packed.zip")
    refuses_all(tokenizer.main, """
        --steps at least 1           | images --out x.pt --steps 0
        --codes at most 65535        | images --out x.pt --codes 65536
        18 no multiple 4             | images --out x.pt --image-size 18
        does not exist               | nowhere --out x.pt
        none.txt no file             | images --out x.pt --subset none.txt
        leave --subset out           | shapes --out x.pt --subset none.txt
        tiny-imagenet-20.txt lists   | images --out x.pt --subset assets/tiny-imagenet-20.txt
        input overwritten            | packed.zip --out packed.zip
        images folder name a file    | images --out images
        """, *train_it)


# ---- model.py ----------------------------------------------------------------------------------------------

def test_parameter_counts_are_llamagens():
    for name, count in {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672}.items():
        with torch.device("meta"):
            net = model.Transformer(model.ModelConfig(*model.SIZES[name]))
        assert sum(p.numel() for p in net.parameters()) == count, name
        assert "layers.3.attention.wqkv.weight" in net.state_dict() and "rope" not in net.state_dict()


def test_first_loss_is_ln_v():
    net = model.Transformer(model.ModelConfig(2, 2, 32, vocab_size=37, num_tokens=16))
    tokens, classes = some_tokens(count=16, vocab=37)
    close("first loss", losses.ar_loss(net(tokens[:, :-1], classes).logits, tokens), math.log(37))
    close("deviation of the initial weights", net.layers[0].feed_forward.w1.weight.std(), 0.02, 0.001)


def test_golden_numbers():
    """Logits for weights that are sines, once compared with LlamaGen's own code (gpt.py): identical."""
    net = model.Transformer(model.ModelConfig(2, 2, 32, vocab_size=11, num_classes=5, num_tokens=16)).eval()
    for i, (name, p) in enumerate(sorted(net.named_parameters())):
        wave = (torch.arange(p.numel(), dtype=torch.float64) * (i + 1.7)).sin().float().view_as(p)
        p.data = 0.6 * wave if p.ndim > 1 else 1 + 0.3 * wave  # attention that is not flat
    logits = net(torch.arange(15)[None] * 7 % 11, torch.tensor([3])).logits[0]
    golden = [[-5.64374, -10.92551, 8.81785], [5.65620, 9.74436, -8.48716],
              [11.06370, 5.33015, -12.61223], [-12.07770, 5.20766, 10.56476]]
    close("LlamaGen's logits", logits[[0, 1, 7, 15]][:, [0, 5, 10]], golden, 1e-4)


def test_dropout_is_in_three_places():
    """LlamaGen drops tokens, and what each attention and each feed-forward adds; each place works alone."""
    net, (tokens, classes) = tiny_model(n_layer=1).train(), some_tokens()
    plain, layer = net(tokens, classes).logits, net.layers[0]
    for part in (net.tok_dropout, layer.attention.resid_dropout, layer.feed_forward.ffn_dropout):
        part.p = 0.5
        assert not torch.equal(net(tokens, classes).logits, plain), part
        part.p = 0.0


def test_causality_and_masked_key():
    """A token reaches its own position and later ones; where its key is hidden (Eq. 3), its own alone."""
    net, (tokens, classes) = tiny_model(), some_tokens()
    mask, places = torch.zeros(3, 16, dtype=torch.bool), torch.arange(16)
    mask[:, 7] = True
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 11  # token x_7 is at position 7
    for key_mask, moved in ((None, places >= 7), (torch.zeros_like(mask), places >= 7), (mask, places == 7)):
        a, b = (net(x, classes, key_mask=key_mask).logits for x in (tokens, changed))
        assert torch.equal((a - b).abs().amax((0, 2)) > 1e-6, moved)


def test_explicit_attention_equals_fused():
    net, (tokens, classes) = tiny_model(), some_tokens()
    for key_mask in (None, losses.sample_key_mask(3, 16, 0.4, torch.Generator().manual_seed(0))):
        fused, explicit = (net(tokens, classes, key_mask=key_mask, return_attention=way)
                           for way in (False, True))
        close("logits", explicit.logits, fused.logits)
        for weights in explicit.attention:  # (B, H, T, T)
            close("rows of the attention", weights.sum(-1), torch.ones(3, 2, 16))


def test_attention_against_the_formula():
    """One layer by hand: complex rotation by 2D positions, zero class query and key, attention's formula."""
    net, (tokens, classes) = tiny_model(), some_tokens(batch=1)
    x = torch.cat([net.cls_embedding["embedding_table"](classes)[:, None], net.tok_embeddings(tokens)], 1)
    layer = net.layers[0]
    qkv = layer.attention.wqkv(layer.attention_norm(x))[0].view(16, 3, 2, 16)
    turn = torch.zeros(16, 8, dtype=torch.complex64)  # position 0, the class: factor zero
    for p in range(1, 16):
        for j in range(4):
            for half, place in enumerate(divmod(p - 1, 4)):  # row, column
                turn[p, 4 * half + j] = np.exp(1j * place * 10000.0 ** (-2 * j / 8))
    heads = []
    for h in range(2):
        q, k = (torch.view_as_real(torch.view_as_complex(qkv[:, i, h].reshape(16, 8, 2)) * turn).flatten(1)
                for i in (0, 1))
        later = torch.ones(16, 16).triu(1).bool()
        heads.append((q @ k.T / 4).masked_fill(later, -math.inf).softmax(1) @ qkv[:, 2, h])
    after = x[0] + layer.attention.wo(torch.cat(heads, 1))
    after = after + layer.feed_forward(layer.ffn_norm(after))
    close("layer 1", net(tokens, classes, layers=(1,), head=False).hidden[1][0], after, 1e-4)


# ---- losses.py ---------------------------------------------------------------------------------------------

def test_key_masks(seed=0):
    """Eq. 3: exactly round(r (T - 1)) keys of each row, never the class; over the rows every other one."""
    generator = torch.Generator().manual_seed(seed)
    for ratio, count in ((0.25, 16), (0.4, 25), (0.0, 0)):  # of 63; of 64 the second would be 26
        mask = losses.sample_key_mask(200, 64, ratio, generator)
        close(f"hidden keys of each row at ratio {ratio}", mask.sum(1), [count] * 200)
        often = mask.float().mean(0)
        close("how often position 0, the class, is hidden", often[0], 0)
        close(f"how often each other one is at ratio {ratio}", often[1:], [ratio] * 63, 0.2)
    for ratio in (-0.1, 1.0, math.nan):
        refuses("mask ratio", losses.sample_key_mask, 2, 64, ratio, generator)


def test_positions(seed=0):
    """Eq. 5: distinct, from 1 ... T - 1, each now and then."""
    generator, seen = torch.Generator().manual_seed(seed), set()
    for _ in range(200):
        positions = losses.sample_positions(16, 4, generator).tolist()
        assert len(set(positions)) == 4, f"seen {positions}, expected 4 different positions"
        seen |= set(positions)
    assert seen == set(range(1, 16)), f"in 200 draws seen {sorted(seen)}, expected all of 1 ... 15"
    refuses("K = 16", losses.sample_positions, 16, 16, generator)


def test_ar_loss(seed=0):
    """Eq. 2 by a loop: the logits of place t are for the token of place t, not for a neighbour's."""
    torch.manual_seed(seed)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    chances = logits.exp() / logits.exp().sum(-1, keepdim=True)
    nats = [-math.log(chances[b, t, tokens[b, t]]) for b in range(2) for t in range(5)]
    close("Eq. 2", losses.ar_loss(logits, tokens), np.mean(nats))


def test_mim_loss(seed=0):
    """Eq. 4: 1 - cosine, averaged over images and positions."""
    torch.manual_seed(seed)
    h, other = torch.randn(2, 2, 5, 8)
    close("L_MIM of features in the same direction", losses.mim_loss(h, 3 * h), 0)
    close("L_MIM of opposite features", losses.mim_loss(h, -h), 2)
    expected = [1 - a @ b / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(h.view(10, 8), other.view(10, 8))]
    close("L_MIM of two sets of features", losses.mim_loss(h, other), np.mean(expected))


def test_projector(seed=0):
    """Eq. 5: twice a linear layer, normalised over the width, through SiLU; then a last linear layer."""
    torch.manual_seed(seed)
    f, x = losses.projector(6), torch.randn(3, 6)
    *linears, last = (part for part in f if isinstance(part, torch.nn.Linear))
    expected = x
    for linear in linears:
        h = linear(expected)
        h = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True, unbiased=False)
        expected = h * h.sigmoid()
    close("z = f(h)", f(x), last(expected), 1e-3)


def nce_by_hand(anchor, targets, positive, temperature):
    """-log softmax of one anchor over its candidates, in plain Python numbers."""
    scores = [F.cosine_similarity(anchor, target, dim=0).item() / temperature for target in targets]
    return -scores[positive] + math.log(sum(math.exp(score) for score in scores))


def test_info_nce_is_the_double_loop(seed=0):
    """3 slots of 4 anchors and 12 targets; the positive of anchor b is target b, the others are negatives."""
    torch.manual_seed(seed)
    a, t = torch.randn(3, 4, 6), torch.randn(3, 12, 6)
    loss, accuracy = losses.info_nce(a, t, 0.3)
    close("InfoNCE", loss, np.mean([nce_by_hand(a[s, b], t[s], b, 0.3) for s in range(3) for b in range(4)]))
    closest = F.cosine_similarity(a[:, :, None], t[:, None], dim=-1).argmax(-1)  # (3, 4)
    close("accuracy", accuracy, (closest == torch.arange(4)).float().mean())
    close("accuracy of anchors that are their targets", losses.info_nce(t[:, :4], t, 0.1)[1], 1)
    close("accuracy of anchors that are other targets", losses.info_nce(t[:, 4:8], t, 0.1)[1], 0)


def test_losses_are_float32_under_autocast():
    """Targets of mean cosine .99 are told apart; products in bfloat16 made most of them ties."""
    torch.manual_seed(0)
    targets = torch.randn(1, 1, 96) + 0.1 * torch.randn(2, 24, 96)
    anchors = targets + 1e-3 * torch.randn_like(targets)
    plain = losses.info_nce(anchors, targets, 0.2), losses.mim_loss(anchors, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses.info_nce(anchors, targets, 0.2), losses.mim_loss(anchors, targets)
    assert same(plain, mixed) and plain[0][1] == 1


def test_step_and_view_losses_are_equations_6_and_7(seed=0):
    """All views, positions and images by loops; negatives are the other images of the same slot."""
    torch.manual_seed(seed)
    V, K, B, C = 2, 3, 4, 6
    z, h = torch.randn(2, V, K, B, C)
    step = [nce_by_hand(z[m, i, b], h[m, j], b, 0.2)
            for m in range(V) for i in range(K) for j in range(K) if i != j for b in range(B)]
    view = [nce_by_hand(z[i, k, b], h[j, k], b, 0.2)
            for i in range(V) for j in range(V) if i != j for k in range(K) for b in range(B)]
    close("Eq. 6", losses.step_loss(z, h, 0.2)[0], np.mean(step))
    close("Eq. 7", losses.view_loss(z, h, 0.2)[0], np.mean(view))
    refuses("K >= 2", losses.step_loss, z[:, :1], h[:, :1], 0.2)
    refuses("V >= 2", losses.view_loss, z[:1], h[:1], 0.2)


def test_total_loss(seed=0):
    """Eq. 8; a term that is absent counts as zero, and the division by 2 stays."""
    torch.manual_seed(seed)
    ar, mim, step, view, alpha, beta = torch.rand(6)
    terms = {"ar": ar, "mim": mim, "step": step, "view": view}
    close("Eq. 8", losses.total_loss(terms, alpha, beta), ar + alpha * mim + beta * (step + view) / 2)
    del terms["mim"], terms["step"]
    close("Eq. 8 without MIM and step", losses.total_loss(terms, alpha, beta), ar + beta * view / 2)


def test_label_accuracy(seed=0):
    """Among m images of one class a guess is right with chance 1 / m."""
    torch.manual_seed(seed)
    classes = torch.randint(5, (12,))
    expected = np.mean([1 / (classes == c).sum() for c in classes])
    close(f"label accuracy of classes {classes.tolist()}", losses.label_accuracy(classes), expected)


def test_ema_and_no_gradient_for_the_teacher(seed=0):
    torch.manual_seed(seed)
    student, teacher = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    old, new = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (teacher, student))
    losses.update_ema(teacher, student, 0.9)
    left, right = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (teacher, student))
    close("teacher after an update with decay 0.9", left, 0.9 * old + 0.1 * new)
    close("student after the teacher's update", right, new, 0)
    for name, loss in (("step", losses.step_loss), ("view", losses.view_loss),
                       ("mim", lambda z, h, _: [losses.mim_loss(z, h)])):
        z, h = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(2))
        loss(z, h, 0.2)[0].backward()
        assert z.grad is not None and z.grad.any(), f"{name}: no gradient reaches the student; expected one"
        assert h.grad is None, f"{name}: a gradient reaches the teacher; expected none"


# ---- train.py ----------------------------------------------------------------------------------------------

def a_config(**changes):
    settings = dict(model="nano", depth=2, batch=8, data="images", device="cpu", image_size=16)
    return train.Config(**settings | changes)


def a_cache(images=20, views=10, tokens=16, seed=0):
    labels = np.arange(images) % 4
    labels[3] = -1  # an image that could not be read
    codes = np.random.default_rng(seed).integers(11, size=(images, views, tokens)).astype(np.uint16)
    return tokenizer.TokenCache(codes, labels, {"classes": list("abcd"), "codebook_size": 11})


def an_objective(config, **changes):
    """A student of 4 layers, its projector, and a teacher that is not its copy."""
    changes = dict(n_layer=4, dim=96, n_head=3, num_classes=4) | changes
    objective = train.Objective(config, tiny_model(**changes).train())
    objective.teacher.load_state_dict(tiny_model(5, **changes).state_dict())
    return objective


def a_run(config, objective, dtype=None):
    scaler = torch.amp.GradScaler("cpu", 2.0 ** 10, enabled=dtype is torch.float16)
    return train.Run(config, 0, 1, torch.device("cpu"), dtype, None, a_cache(), a_cache(seed=1, views=1),
                     objective, train.make_optimizer(objective, config), scaler, 0, 4)


def test_batches_do_not_depend_on_the_number_of_processes():
    config, cache = a_config(class_dropout=0.5), a_cache()

    def draw(config=config, step=5, rank=0, world=1):
        return train.draw_batch(config, cache, step, rank, world)

    whole, parts = draw(), [draw(rank=rank, world=4) for rank in range(4)]
    for name in ("tokens", "classes", "key_mask"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert all(torch.equal(whole.positions, part.positions) for part in parts)
    for other in (draw(step=6), draw(a_config(class_dropout=0.5, seed=1))):
        assert not any(map(torch.equal, whole, other))
    assert not torch.equal(*whole.key_mask.unbind(1))  # each view has its own mask
    assert (whole.key_mask.sum(-1) == 4).all()  # a quarter of the 15 positions behind the class
    kept, null = (draw(a_config(class_dropout=share)).classes for share in (0.0, 1.0))
    dropped = whole.classes == 4  # the null class
    assert (null == 4).all() and (kept < 4).all() and 0 < dropped.sum() < 8
    assert torch.equal(whole.classes, kept.where(~dropped, null))


def test_an_epoch_visits_each_image_once_with_different_views():
    cache, orders, pairs = a_cache(), set(), set()
    key = {tuple(cache.tokens[i, v]): (i, v) for i in range(20) for v in range(10)}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        config, seen = a_config(class_dropout=0.0, batch=5, seed=seed), []
        for step in range(3):  # 19 readable images, batches of 5
            batch = train.draw_batch(config, cache, 3 * epoch + step, 0, 1)
            for views, label in zip(batch.tokens.tolist(), batch.classes.tolist()):
                (i, a), (j, b) = (key[tuple(view)] for view in views)
                assert i == j and a != b and label == cache.labels[i]
                seen.append(i)
                pairs.add((a, b))
        assert len(set(seen)) == 15 and 3 not in seen
        orders.add(tuple(seen))
    assert len(orders) == 3 and len(pairs) > 20  # of 90 there are


ALL_LOSSES = train.CHOICES["losses"]


def test_which_loss_runs_what():
    """Keys are hidden exactly when L_MIM is on; a plain AR run needs no teacher; all else is trained."""
    batch = train.draw_batch(a_config(), a_cache(), 0, 0, 1)
    for on in ALL_LOSSES:
        config = a_config(losses=on)
        objective = an_objective(config)
        log = objective(*batch)
        unmasked = objective(*batch._replace(key_mask=torch.zeros_like(batch.key_mask)))
        assert (log["loss_ar"] != unmasked["loss_ar"]) == ("mim" in on), on
        assert [name for name in log if name.startswith("loss_")] == [f"loss_{name}" for name in config.terms]
        log["loss"].backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        trained = [*objective.student.parameters(), *objective.projector.parameters()]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        for p in objective.teacher.parameters():
            p.data.fill_(math.nan)
        assert objective(*batch)["loss"].isnan() == (on != "ar"), on


def test_each_position_predicts_the_next_token():
    """Eq. 2 through an Objective, by hand: x_(t + 1) from the class and the t tokens before it alone."""
    batch = train.draw_batch(a_config(), a_cache(), 0, 0, 1).chunk(4)[0]  # of 2 images
    for on in ("ar", "ar+mim"):
        objective, by_hand = an_objective(a_config(losses=on)), []
        for b, m, t in itertools.product(range(2), range(2), range(16)):
            mask = batch.key_mask[b, m, None, :t + 1] if on == "ar+mim" else None
            known, c = batch.tokens[b, m, None, :t], batch.classes[b, None]
            logits = objective.student(known, c, key_mask=mask).logits[0, t]
            by_hand.append(-logits.log_softmax(-1)[batch.tokens[b, m, t]].item())
        close(on, objective(*batch)["loss_ar"], np.mean(by_hand))


def test_losses_of_a_batch_by_hand():
    """An Objective pairs views, positions and images as Eqs. 4, 6 and 7 say; the sum is that of Eq. 8."""
    config = a_config(temperature=0.5)
    batch, objective = train.draw_batch(config, a_cache(), 0, 0, 1), an_objective(config)
    log = objective(*batch)
    z, h, mim = {}, {}, []
    for b in range(8):
        for m in range(2):
            tokens, c, mask = batch.tokens[b:b + 1, m], batch.classes[b:b + 1], batch.key_mask[b:b + 1, m]
            s = objective.student(tokens[:, :-1], c, key_mask=mask, layers=(2, 4)).hidden
            t = objective.teacher(tokens[:, :-1], c, layers=(2, 4)).hidden
            mim.append(losses.mim_loss(s[4], t[4]))
            for k in batch.positions.tolist():
                z[b, m, k], h[b, m, k] = objective.projector(s[2][0, k]), t[2][0, k]
    K = batch.positions.tolist()
    step = np.mean([nce_by_hand(z[b, m, i], [h[other, m, j] for other in range(8)], b, 0.5)
                    for b in range(8) for m in range(2) for i in K for j in K if i != j])
    view = np.mean([nce_by_hand(z[b, i, k], [h[other, 1 - i, k] for other in range(8)], b, 0.5)
                    for b in range(8) for i in range(2) for k in K])
    mim = sum(mim) / len(mim)
    for name, value in (("mim", mim), ("step", step), ("view", view)):
        close(name, log[f"loss_{name}"], value)
    close("Eq. 8", log["loss"], log["loss_ar"] + mim + 0.5 * (step + view) / 2)


def test_an_optimizer_step_by_hand():
    """Two steps from the draw to the EMA: clipping, AdamW, decay of matrices alone, the teacher."""
    config = a_config(clip=0.05, weight_decay=0.3, base_lr=0.32, warmup=3, ema=0.9)
    objective, twin = an_objective(config), an_objective(config)
    run = a_run(config, objective)
    trained = [*twin.student.parameters(), *twin.projector.parameters()]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95))
    for step in range(2):
        batch = train.load_batch(run, step)
        log = train.train_step(run, objective, batch, step)
        optimizer.zero_grad()
        twin(*batch)["loss"].backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        assert norm > config.clip and abs(log["grad_norm"] / norm - 1) < 1e-4
        for p in trained:
            p.grad *= config.clip / norm
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 3 * (0.05 + 0.95 * (1 + math.cos(math.pi * step / 4)) / 2)
        optimizer.step()
        keep = 1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for old, new in zip(twin.teacher.parameters(), twin.student.parameters()):
            old.data = keep * old + (1 - keep) * new
    start = an_objective(config).state_dict()
    for name, value in objective.state_dict().items():
        off, moved = (value - twin.state_dict()[name]).norm(), (value - start[name]).norm()
        assert off <= 1e-3 * moved, (name, off, moved)


def test_float16_skips_a_step_that_overflows_and_goes_on():
    """As on an old GPU: with too large a scale nothing moves, so that the next is a first step in float32."""
    half, single = (a_run(a_config(), an_objective(a_config()), dtype) for dtype in (torch.float16, None))
    batch, logs = train.load_batch(single, 0), []
    for scale in (2.0 ** 100, 2.0 ** 10):
        half.scaler.load_state_dict(half.scaler.state_dict() | {"scale": scale})
        logs.append(train.train_step(half, half.objective, batch, 0))
    expected = train.train_step(single, single.objective, batch, 0)
    assert logs[0]["grad_norm"] == 0
    assert train.states(half)["scaler"].get_scale() == scale  # what a checkpoint keeps
    close("gradient norm", logs[1]["grad_norm"], expected["grad_norm"], 0.01)
    assert 0 < abs(logs[1]["loss"] - expected["loss"]) < 0.01  # it is rounded


def test_dropout_is_new_in_every_step_and_never_the_teachers():
    config = a_config(base_lr=1e-12, weight_decay=0.0, ema=1.0)
    objective = an_objective(config, dropout=0.5)
    run, batch = a_run(config, objective), train.draw_batch(config, a_cache(), 0, 0, 1)
    first, second, again = (train.train_step(run, objective, batch, step)["loss_ar"] for step in (0, 1, 0))
    other = train.train_step(run._replace(rank=1), objective, batch, 0)["loss_ar"]  # of another process
    assert abs(first - again) < 1e-4 < min(abs(first - second), abs(first - other))
    assert train.validation_loss(run) == train.validation_loss(run)
    assert objective.student.tok_dropout.training and not objective.teacher.tok_dropout.training


def test_schedules():
    """The ends, and the paper's constants; what lies between is in the step by hand."""
    short, paper = a_config(base_lr=1e-3, batch=512, warmup=10, ema=0.9), a_config(
        base_lr=1e-4, batch=256, warmup=0, schedule="constant", ema=0.9999, ema_ramp=False)
    close("the end", train.learning_rate(short, 100, 100), 1e-4, 1e-9)
    assert train.ema_decay(short, 100, 100) == 1
    assert train.learning_rate(paper, 77, 100) == 1e-4 and train.ema_decay(paper, 50, 100) == 0.9999


def test_flags_come_from_the_config():
    config, given, resume = train.parse_arguments(["--preset", "B", "--losses", "ar", "--resume"])
    assert config.name == "B-ar" and given == {"preset": "B", "losses": "ar"} and resume
    paper = dict(views=2, mask_ratio=0.25, positions=4, depth=18, alpha=1.0, beta=0.5, ema=0.9999,
                 ema_ramp=False, crop_ratios=(1.1, 1.05), base_lr=1e-4, schedule="constant", warmup=0,
                 weight_decay=0.05, clip=1.0, class_dropout=0.1, dropout=0.1, batch=256,
                 losses="ar+mim+step+view")
    assert paper.items() <= vars(train.parse_arguments(["--preset", "L"])[0]).items()


def test_train_refuses_likely_mistakes():
    trained_run()
    tokenizer.save_tokenizer(workshop() / "other.pt", tokenizer.VQModel(our_vq().config))
    (workshop() / "two.txt").write_text("class0\nclass1\n")
    refuses_all(train.main, """
        invalid choice ar+mim        | --losses mim
        --dropout 1.5 at most        | --dropout 1.5
        layers 1 ... 4               | --depth 5
        10 crops                     | --views 11
        view compares at least 2     | --views 1
        at least 2 --positions       | --positions 1
        --positions 16 15 after      | --positions 16
        multiple of 1 x 3            | --accumulate 3
        2 images                     | --batch 1
        vq_ds16_c2i.pt ImageNet      | --image-size 256 --tokenizer train
        training images 48 fewer     | --batch 48
        --name letters               | --name ..
        trained exists --resume      | --name trained
        no none.pt                   | --tokenizer none.pt
        nowhere does not exist       | --data nowhere
        """, *SMALL)
    refuses_all(train.main, """
        no file never                | --name never
        preset = nano, not tiny      | --name trained --preset tiny
        losses not ar                | --name trained --losses ar
        steps = 1, not 2 follows     | --name trained --steps 2
        codes another tokenizer      | --name trained --tokenizer other.pt
        codes another images         | --name trained --subset two.txt
        """, "--resume")
    assert checkpoint("trained")["step"] == 1


def test_accumulation_equals_one_batch():
    """Without contrast a micro-batch lacks nothing; and a line of the log is the mean over its steps."""
    for pieces in (1, 4):
        run(train.main, *SMALL, "--name", f"in-{pieces}", "--steps", 2, "--losses", "ar+mim",
            "--accumulate", pieces, "--log-every", min(pieces, 2))
    mean, = metrics("in-4")
    for name in ("loss", "loss_ar", "loss_mim", "grad_norm"):
        close(name, mean[name], np.mean([line[name] for line in metrics("in-1")]), 1e-4)


STATE = ("model", "ema", "projector", "optimizer", "step")


def same_run(a, b):
    """Assert that two runs of the workshop ended bit-identical and have the same losses in all steps."""
    one, two = checkpoint(a), checkpoint(b)
    assert [key for key in STATE if not same(one[key], two[key])] == []
    assert [(line["step"], line["loss"]) for line in metrics(a)] == [
        (line["step"], line["loss"]) for line in metrics(b)]


def test_killed_and_resumed_is_bit_identical():
    """kill -9 in the middle of a run with dropout, then --resume: every tensor as in the undisturbed run."""
    settings = [*SMALL, "--steps", 12, "--save-every", 3, "--dropout", 0.1]
    folder, checkpoints = workshop() / "runs" / "killed", set()

    def in_the_middle():
        if (folder / "checkpoint.pt").exists():
            checkpoints.add((folder / "checkpoint.pt").stat().st_ino)
        return len(metrics("killed")) > 4

    assert not finish(launch("train.py", *settings, "--name", "killed"), in_the_middle)
    assert len(checkpoints) > 1, "checkpoint.pt is written in place"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process had; more threads round sums differently
    with replaced(folder / "config.json", folder / "metrics.jsonl"):
        run(train.main, *settings, "--name", "killed", "--resume")
    run(train.main, *settings, "--name", "whole")
    torch.set_num_threads(threads)
    same_run("killed", "whole")
    trained_run()  # which differs in its first step by dropout alone
    assert metrics("whole")[0]["loss_mim"] != metrics("trained")[0]["loss_mim"]


def test_what_a_run_shows_of_itself():
    """Its last grid and held-out loss are those of its checkpoint, without dropout."""
    folder, others = trained_run(), our_images("val")
    trained = sample.open_trained(folder, None, False, 16, "cpu")
    sample.save_samples(folder / "again.png", trained.model, trained.vq, 2, trained.classes, 7, cfg=2.0)
    assert (folder / "again.png").read_bytes() == (folder / "samples" / "0000001.png").read_bytes()
    codes = tokenizer.encode_pixels(trained.vq, tokenizer.held_out_pixels(others, 16, 4))
    logits = trained.model(codes[:, :-1], torch.from_numpy(others.labels)).logits
    close("held-out loss", metrics("trained")[-1]["val_nll"], losses.ar_loss(logits, codes))


def test_signals_save_and_end():
    """Ctrl-C, and what batch systems send; but not what is ignored, as SIGHUP is under nohup."""
    step, kinds = train.train_step, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def struck(run, *rest):
        if rest[-1] == 1:
            signal.raise_signal(run.config.seed)
        return step(run, *rest)

    settings = [*SMALL, "--samples", 0, "--steps", 3]
    with patch.object(train, "train_step", struck):
        for kind in kinds:
            signal.signal(kind, signal.default_int_handler)  # in the background a shell may ignore it
            refuses(f"Saved after step 2 --resume --name struck-{kind}", run, train.main,
                    *settings, "--name", f"struck-{kind}", "--seed", int(kind))
            assert checkpoint(f"struck-{kind}")["step"] == 2
        signal.signal(kind, signal.SIG_IGN)
        run(train.main, *settings, "--name", "nohup", "--seed", int(kind))
    for kind in kinds:
        signal.signal(kind, signal.default_int_handler)
    assert checkpoint("nohup")["step"] == 3


def test_a_run_begins_with_its_seed():
    """Seen after one small step; the teacher begins as the student."""
    begun = checkpoint(trained_run())
    torch.manual_seed(7)
    start = model.Transformer(model.ModelConfig(**begun["model_config"])).state_dict()
    for name, value in start.items():
        close(name, begun["model"][name], value, 1e-3)
        close(name, begun["ema"][name], value, 1e-3)


def test_two_processes_equal_one():
    """All that is logged, but for near ties: the norm of the gradients, too, and losses after a step."""
    settings = [*SMALL, "--steps", 2, "--samples", 0]
    assert finish(launch("train.py", *settings, "--name", "two", processes=2))
    run(train.main, *settings, "--name", "one")
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        assert a.keys() == b.keys() and a["negatives"] == 7
        for name in a.keys() - {"tokens_per_second", "acc_step", "acc_view"}:
            close(f"{name} of step {a['step']}", b[name], a[name], 1e-4)


def test_more_steps_after_the_end():
    """With a constant rate and decay as if asked from the start."""
    settings = [*SMALL, "--schedule", "constant", "--no-ema-ramp", "--dropout", 0.1]
    run(train.main, *settings, "--name", "longer", "--steps", 2)
    run(train.main, "--resume", "--name", "longer", "--epochs", 1)  # 44 images: 5 batches of 8
    run(train.main, *settings, "--name", "long", "--steps", 5)
    same_run("longer", "long")


def test_divergence_stops_before_it_is_saved():
    """The first step moves the weights to 1e29; the checkpoint stays the one from before."""
    refuses("loss not finite step 4 diverged", run, train.main, *SMALL, "--steps", 8, "--base-lr",
            1e30, "--log-every", 4, "--name", "diverged")
    assert checkpoint("diverged")["step"] == 0 and metrics("diverged") == []


def test_training_goes_on_where_torch_compile_fails():
    """Whatever it raises, and although the dropout of a step has been drawn: nothing has moved."""
    def broken(module):
        def forward(*batch):
            module(*batch)
            raise RuntimeError("no Triton\nthere is none")
        return forward

    settings, version = [*SMALL, "--steps", 2, "--dropout", 0.1], torch.torch_version.TorchVersion
    run(train.main, *settings, "--name", "uncompiled", "--no-compile")
    for name, compiler, number, words in (
            ("compiled", lambda module: module, "2.13", "Done"), ("broken", broken, "2.7",
             "torch.compile fails here (RuntimeError: no Triton there is none): training without"),
            ("old", lambda module: module, "2.6.0", "before torch 2.7 it gets gradients wrong")):
        with patch.object(torch, "compile", compiler), patch.object(torch, "__version__", version(number)):
            said = run(train.main, *settings, "--name", name, "--compile")
        same_run(name, "uncompiled")
        assert words in said and ("fails" in said) == (name != "compiled"), said


def test_a_run_folder_belongs_to_one_process():
    """Where system and disk have locks; elsewhere, as on Windows or some clusters, a warning is all."""
    folder, resume = trained_run(), ["--name", "trained", "--resume"]
    with tokenizer.locked(folder):
        with contextlib.suppress(ImportError):
            __import__("fcntl")
            refuses("another process", run, train.main, *resume)
        refuse = MagicMock(**{"flock.side_effect": OSError(38, "Function not implemented")})
        for system in (None, refuse):
            with patch.dict(sys.modules, fcntl=system):
                said = run(train.main, *resume)
            assert "!!" in said and "(class0, class1, class2 ...)" in said and "Done: runs/trained/" in said


# ---- sample.py ---------------------------------------------------------------------------------------------

def test_filters():
    """Top-k, then the nucleus of what it left, by hand; the codes are not in order."""
    logits = torch.tensor([[0.05, 0.4, 0.2, 0.05, 0.3]]).log()
    for top_k, top_p, expected in (
        (4, 1.0, [0, 1, 2, 3, 4]),  # a tie with the fourth stays
        (0, 0.65, [1, 4]),  # the one that crosses p is kept
        (0, 0.75, [1, 2, 4]),
        (2, 0.5, [1]),  # 4/7 > .5
    ):
        kept = sample.filter_logits(logits, top_k, top_p)
        assert kept.isfinite()[0].nonzero().flatten().tolist() == expected, (top_k, top_p, kept)


def test_generation_against_the_whole_sequence():
    """No cache, guidance by hand, torch.multinomial: LlamaGen's tokens stay LlamaGen's."""
    net, classes = tiny_model(vocab_size=50), torch.tensor([0, 3, 4])
    for cfg, interval, temperature, top_k, top_p in (
            (1.0, -1, 0, 0, 1.0), (3.0, -1, 1e-300, 0, 1.0), (3.0, 4, 1.0, 0, 1.0), (1.0, -1, 0.5, 7, 1.0),
            (1.5, -1, 2.0, 0, 0.6)):
        tokens, g, again = torch.zeros(3, 0, dtype=torch.long), torch.Generator(), torch.Generator()
        for p in range(16):
            logits = net(tokens, classes).logits[:, -1]
            if cfg > 1 and (interval < 0 or p < interval + 2):
                null = net(tokens, torch.full_like(classes, 5)).logits[:, -1]
                logits = null + (logits - null) * cfg
            if temperature < 1e-9:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                kept = sample.filter_logits(logits / temperature, top_k, top_p)
                drawn = torch.multinomial(kept.softmax(-1), 1, generator=g)
            tokens = torch.cat([tokens, drawn], 1)
        seen = sample.generate(net, classes, cfg=cfg, cfg_interval=interval, temperature=temperature,
                               top_k=top_k, top_p=top_p, generator=again)
        assert torch.equal(seen, tokens), (cfg, interval, seen, tokens)


def test_a_step_of_fixed_shapes_equals_the_model():
    """What a GPU records once and replays for each token: no shape depends on the position."""
    net, (tokens, classes) = tiny_model(), some_tokens()
    cache, expected = sample.KVCache(net, 3), net(tokens, classes).logits
    with torch.no_grad():
        net(tokens[:, :0], classes, cache=cache)
        for p in range(1, 16):
            seen = sample.decode_step(net, tokens[:, p - 1], torch.tensor([p]), cache)
            close(f"position {p}", seen, expected[:, p])


def test_bfloat16_leaves_the_rotary_table_alone():
    net = tiny_model()
    sample.to_bfloat16(net)
    assert net.rope.dtype == torch.float32 and sample.KVCache(net, 1).kv.dtype == torch.bfloat16
    assert net(*some_tokens()).logits.dtype == torch.float32


def test_images_are_resized_as_llamagen_does():
    net, vq, classes = tiny_model(vocab_size=64), our_vq(), torch.tensor([0, 3, 4])
    codes = sample.generate(net, classes, generator=torch.Generator().manual_seed(1))
    pixels = F.interpolate(vq.decode(codes), size=(9, 9), mode="bicubic", antialias=False)
    ours = sample.sample_images(net, vq, classes, 1, resize_to=9)
    assert np.array_equal(ours, tokenizer.to_uint8(pixels).numpy())


def test_labels_are_balanced_from_the_first_image_on():
    labels = sample.mixed_labels(1234, 100)
    for block in labels[:1200].split(100):
        assert block.sort().values.tolist() == list(range(100))
    assert labels[:100].tolist() != labels[100:200].tolist()
    assert torch.equal(labels[:50], sample.mixed_labels(50, 100))


def test_a_killed_npz_goes_on_with_its_own_parts_only():
    """By one process or by two."""
    net, vq, path = tiny_model(vocab_size=64), our_vq(), scratch() / "a.npz"
    labels, original = sample.mixed_labels(10, 5), sample.sample_images

    def write(weights, killed_at=None, **processes):
        """The first image of each batch that had to be made."""
        made = []

        def make(model, vq, classes, seed, **settings):
            if seed - 7 == killed_at:
                raise KeyboardInterrupt
            made.append(seed - 7)
            return original(model, vq, classes, seed, **settings)

        one = sample.Trained("x", net, vq, list("abcde"), {}, {"images": ""}, {"weights_digest": weights})
        with patch.object(sample, "sample_images", make), patch.dict(os.environ, processes):
            with contextlib.suppress(KeyboardInterrupt):
                sample.save_npz(path, one, 10, 3, 7, "fp32", cfg=2.0)
        return made

    assert write("A", killed_at=6) == [0, 3]
    assert write("B", RANK="1", WORLD_SIZE="2") == [3, 9] and not path.exists()
    assert write("A") == [6, 9] and [*path.parent.iterdir()] == [path]  # no part is left
    with replaced(path):
        write("A")
    file = np.load(path)
    for i in (0, 3, 6, 9):  # seeded by place
        batch = original(net, vq, labels[i:i + 3], 7 + i, cfg=2.0)
        assert np.array_equal(file["arr_0"][i:i + 3], batch)
    assert np.array_equal(file["arr_1"], labels) and file["classes"].tolist() == list("abcde")
    how = dict(weights_digest="A", precision="fp32", device="cpu", seed=7, batch=3, num=10, cfg=2.0)
    assert json.loads(str(file["protocol"])) == how


def test_checkpoints_of_all_kinds():
    """Ours, LlamaGen's, and other people's: prefixes, other keys, objects beside the weights."""
    net, path = tiny_model(), scratch() / "x.pt"
    state = net.state_dict()
    skips_foreign = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # torch 2.6

    def load(content, ema=False):
        torch.save(content, path)
        return sample.load_model(path, ema, image_size=64)[0].state_dict()

    assert same(load({"model": state, "model_config": vars(net.config)}), state)
    refuses("3 layers width 32", load, state)
    with patch.dict(model.SIZES, test=(3, 2, 32)):  # LlamaGen's files do not say how many heads there are
        assert same(load({"model": state | {"freqs_cis": torch.zeros(17, 8, 2)}, "steps": 7}), state)
        assert same(load({"state_dict": {f"module._orig_mod.{name}": state[name] for name in state}}), state)
        blocks = {name.replace("layers.0", "layers.0._orig_mod"): state[name] for name in state}
        foreign = {"best": np.float64(1), "config": Path("x")} if skips_foreign else {}
        assert same(load({"model_state_dict": blocks, "args": {"image_size": 64}, **foreign}), state)
        assert sample.load_model(path)[0].config.num_tokens == 16
        refuses("no EMA weights", load, state, ema=True)
        refuses("no weights ema", load, {"ema": state})
        refuses("no transformer surprise", load, state | {"surprise": torch.zeros(1)})
        refuses("nan", load, state | {"norm.weight": torch.full((32,), math.nan)})


def same_picture(path, image):
    return np.array_equal(np.asarray(Image.open(workshop() / path)), np.asarray(image))


def test_sample_script():
    """Grids, alone and below each other, and an npz of the teacher."""
    root, trained = workshop(), sample.open_trained(trained_run(), None, False, 0, "cpu")
    drawing = ["runs/trained", "--classes", 3, 0, 3, "--cfg", 2, "--seed", 5, "--out", "grid.png"]
    run(sample.main, *drawing)
    pixels = sample.sample_images(trained.model, trained.vq, torch.tensor([3, 0, 3]), 5, cfg=2.0)
    single = sample.image_grid(pixels, 3, ["class3", "class0", "class3"])
    assert same_picture("grid.png", single)
    with replaced(root / "grid.png"):
        run(sample.main, "runs/trained", *drawing)
    titled = np.asarray(sample.image_grid(pixels, 3, ["class3", "class0", "class3"], "trained"))
    assert same_picture("grid.png", np.concatenate([titled, titled]))
    run(sample.main, "runs/trained", "--num-images", 5, "--ema", "--npz", "few")
    protocol = json.loads(str(np.load(root / "few.npz")["protocol"]))
    trained.model.load_state_dict(checkpoint("trained")["ema"])
    assert protocol["weights_digest"] == tokenizer.fingerprint(trained.model)


def test_llamagens_files():
    """Files in the published format, random weights of the published structure."""
    torch.manual_seed(0)
    vq, root = tokenizer.VQModel(tokenizer.VQConfig()).eval(), workshop()
    layout = [[name, list(value.shape)] for name, value in sorted(vq.state_dict().items())]
    assert tokenizer.digest(layout) == "4d7d078a98299077"  # LlamaGen's names and shapes
    torch.save({"model": vq.state_dict()}, root / "vq_ds16.pt")
    net = model.Transformer(model.ModelConfig(*model.SIZES["nano"], num_tokens=4)).eval()
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(image_size=32)}, root / "gpt.pt")
    run(sample.main, "gpt.pt", "--vq", "vq_ds16.pt", "--classes", 207, 360, "--cfg", 4)
    pixels = sample.sample_images(net, vq, torch.tensor([207, 360]), 0, cfg=4.0)
    assert same_picture("samples.png", sample.image_grid(pixels, 2, ["class 207", "class 360"]))
    refuses_all(sample.main, """
        add --vq                | gpt.pt
        no class-conditional    | vq.pt --vq vq.pt
        holds a transformer     | gpt.pt --vq gpt.pt
        64 codes 16384          | gpt.pt --vq vq.pt
        """)
    run(sample.main, "gpt.pt", "--vq", "vq_ds16.pt", "--num-images", 2, "--npz", "theirs")
    assert "classes" not in np.load(root / "theirs.npz").files  # their names are not known
    (root / "vq_ds16.pt").unlink()


def test_sample_refuses():
    trained_run()
    tokenizer.save_tokenizer(workshop() / "another.pt", tokenizer.VQModel(VQ_64))
    refuses_all(sample.main, """
        there is no file none        | none
        another.pt is tokenizer      | runs/trained --vq another.pt
        class 4 0 ... 3              | runs/trained --classes 4
        --cfg .5 at least 1          | runs/trained --cfg .5
        --top-p 1.5 at most          | runs/trained --top-p 1.5
        --num-images and --npz       | runs/trained --npz x
        no --classes                 | runs/trained --npz x --num 4 --classes 1
        takes one run                | runs/trained runs/trained --npz x --num 4
        checkpoint.png               | runs/trained --out runs/trained/checkpoint.pt
        cannot write                 | runs/trained --out vq.pt/y.png
        """)


# ---- probe.py ----------------------------------------------------------------------------------------------

def planted(n, seed, strength=2.0):
    """Features (n, 9, 12) of noise, the label written into the fourth one, and labels (n,) of 4 classes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=g)
    x = torch.randn(n, 9, 12, generator=g)
    x[:, 3, :4] += strength * F.one_hot(labels)
    return x, labels


def test_probe_finds_a_planted_label_and_nothing_else():
    """And as well in 20 epochs as in MAE's 90."""
    (x, labels), (x2, labels2) = planted(1500, 2), planted(4000, 3)
    results = probe.linear_probe(x, labels, torch.arange(1500), x2, labels2, 4)
    with patch.object(probe, "EPOCHS", 90):
        long, = probe.linear_probe(x[:, 3:4], labels, torch.arange(1500), x2[:, 3:4], labels2, 4)
    found = results.pop(3)["accuracy"]
    assert 0.7 < found < 0.95 and abs(found - long["accuracy"]) < 0.01, (found, long)
    assert all(abs(result["accuracy"] - 0.25) < 3.5 * math.sqrt(0.25 * 0.75 / 4000) for result in results)


def test_probe_is_sgd_with_momentum_decay_and_a_falling_rate():
    """Two probes of one feature, side by side, against torch.optim.SGD on the same batches."""
    (x, labels), (x2, labels2) = planted(600, 4), planted(300, 5)
    settings = torch.tensor([[[0.03, 1e-2], [0.1, 0.0]]])
    with patch.object(probe, "EPOCHS", 3):
        ours = probe.fit(x[:, 3:4], labels, torch.arange(600), settings, 4, "cpu")
    correct, total = probe.evaluate(ours, 3 + x2[:, 3:4], labels2)  # moved: it must not normalise these anew
    for h, (rate, decay) in enumerate(settings[0].tolist()):
        linear = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        plain = torch.nn.Sequential(torch.nn.BatchNorm1d(12, eps=1e-6, affine=False), linear)
        optimizer = torch.optim.SGD(linear.parameters(), rate, 0.9, weight_decay=decay)
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / 9))
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            for rows in torch.randperm(600, generator=g).tensor_split(3):
                optimizer.zero_grad()
                F.cross_entropy(plain(x[rows, 3]), labels[rows]).backward()
                optimizer.step()
                fall.step()
        logits = plain.eval()(3 + x2[:, 3])
        close("loss", total[0, h], F.cross_entropy(logits, labels2, reduction="sum"))
        assert correct[0, h] == (logits.argmax(1) == labels2).sum()


def test_probe_settings_are_chosen_on_other_training_images():
    """Crops of an image are alike, labels random: where learning by heart helps, the highest rate wins.

    It would on the test images, which are here among the training images, and on crops of those images.
    """
    g = torch.Generator().manual_seed(0)
    images = torch.arange(60).repeat_interleave(4)
    x = torch.randn(60, 1, 64, generator=g)[images] + 0.1 * torch.randn(240, 1, 64, generator=g)
    labels = torch.randint(4, (60,), generator=g)[images]
    result, = probe.linear_probe(x, labels, images, x[:99], labels[:99], 4)
    by_heart, = probe.linear_probe(x, labels, torch.arange(240), x[:99], labels[:99], 4)
    assert result["learning_rate"] == 0.01 < 0.1 == by_heart["learning_rate"], (result, by_heart)
    setting = torch.tensor([[[result["learning_rate"], result["weight_decay"]]]])
    whole = probe.fit(x, labels, torch.arange(240), setting, 4, "cpu")  # at last on all images
    assert result["accuracy"] == probe.evaluate(whole, x[:99], labels[:99])[0].item() / 99


def measured(codes, labels):
    """A subject, a small model with codes (N, 4, 16) of its images' crops, and what `probe.measure` says."""
    meta = {"classes": list("abcd"), "image_size": 16, "split": "train"}
    train_set, held_out = (codes, labels), (np.roll(codes[:, :1], 1, 0), np.roll(labels, 1))  # another order
    caches = [tokenizer.TokenCache(c.astype(np.uint16), y, meta) for c, y in (train_set, held_out)]
    subject = probe.Subject("x", tiny_model(num_classes=4, vocab_size=64), our_vq(), 2, [1, 2], *caches,
                            our_images(), 1.5, {})
    return subject, probe.measure(subject, argparse.Namespace(train_images=0, crops=3, seed=0, images=5))


def test_measure_pairs_features_labels_and_images():
    """Codes that say the class and nothing else; then codes that say the image, whose label is random."""
    labels = np.arange(44) % 4
    codes = np.broadcast_to(labels[:, None, None], (44, 4, 16)).copy()
    labels[5], codes[5] = -1, 1000  # could not be read
    results = measured(codes, labels)[1]["probe"]
    assert [(r["layer"], r["step"]) for r in results] == [
        (n, step) for n in (1, 2) for step in (2, 4, 6, 8, 10, 12, 14, 16, "mean")]
    assert all(r["accuracy"] == 1 and r["n"] == 43 for r in results), results
    rng = np.random.default_rng(0)
    results = measured(rng.integers(64, size=(44, 1, 16)).repeat(4, 1), rng.integers(4, size=44))[1]["probe"]
    assert {r["learning_rate"] for r in results[3::9]} == {0.01}, results  # crops of an image stay together


def test_features_are_the_models():
    net, (codes, _) = tiny_model(), some_tokens(count=16)
    x, null = probe.extract(net, codes.numpy(), [1, 3], batch=2), torch.full((3,), 5)
    hidden = net(codes[:, :-1], null, layers=(1, 3)).hidden
    expected = [part for n in (1, 3) for part in (hidden[n][:, 1::2], hidden[n].mean(1, keepdim=True))]
    close("features", x, torch.cat(expected, 1), 1e-3)


def test_measure_averages_over_held_out_images():
    """Attention, changed codes and cosines of five images, again."""
    rng, null = np.random.default_rng(1), torch.full((5,), 4)
    subject, results = measured(rng.integers(64, size=(44, 4, 16)), np.arange(44) % 4)
    rows, net = probe.choose(subject.held_out, 5, 0), subject.model
    tokens = torch.from_numpy(subject.held_out.tokens[rows, 0].astype(np.int64))
    maps = net(tokens[:, :-1], null, return_attention=True).attention
    mean = torch.stack([weights.mean((0, 1)) for weights in maps])
    for kind, values in probe.attention_numbers(mean, 4).items():
        close(kind, results["attention"][kind], values)
    pixels, codes = probe.crops_and_codes(subject, rows)
    for crops, row in zip(pixels, rows):
        assert np.array_equal(crops[:2], tokenizer.ten_crops(subject.images.read(row), 16, 1.5)[[0, 3]])
        for crop, shift in zip(crops[2:], (0, 1, 2, 4, 8)):
            assert np.array_equal(crop[:, :16 - shift], crops[2][:, shift:])
    for i, shift in enumerate((1, 2, 4, 8)):
        close("changed codes", results["codes_changed"][shift], (codes[:, 3 + i] != codes[:, 2]).mean())
    pairs = [net(torch.tensor(codes[:, v, :-1]), null, layers=(2,)).hidden[2][:, 1::2] for v in (0, 1)]
    for kind, value in probe.consistency(torch.stack(pairs, 1)).items():
        close(kind, results["cosine"][kind], value, 1e-3)


def test_attention_numbers():
    """Attention to the own token only, to the left one only, and spread evenly over what can be seen."""
    own, left = torch.eye(17)[None], torch.zeros(1, 17, 17)  # the class, then a 4 x 4 grid
    left[0, 1:, :-1] = torch.eye(16)  # the first query sees the class, three are first in a row
    expected = {"class": [0, 1 / 16], "itself": [1, 0], "neighbours": [0, 12 / 16], "elsewhere": [0, 3 / 16],
                "distance": [0, (12 + 3 * math.sqrt(10)) / 15]}
    for kind, values in probe.attention_numbers(torch.cat([own, left]), 4).items():
        close(kind, values, expected[kind])
    total, weight = 1 / 3 + (1 + math.sqrt(2)) / 4, 1 / 2 + 2 / 3 + 3 / 4  # of three queries on a 2 x 2 grid
    close("even", probe.even_distance(4), total / weight)


def test_consistency_and_interval_in_closed_form():
    eye = torch.eye(5)
    x = (eye[:2, None] + 2 * eye[2:])[:, None]  # 2 images, 3 positions
    close("cosines", list(probe.consistency(torch.cat([x, -x], 1)).values()), [0.2, -1, 0.8])
    close("interval", probe.wilson(8, 10), [0.49016, 0.94332], 1e-4)


def test_probe_script():
    path = workshop() / "figures" / "probe.json"
    path.parent.mkdir()
    path.write_text("old")
    with replaced(path):
        said = run(probe.main, trained_run(), "--layers", "all", "--images", 4)
    for picture in ("probe", "attention", "distance", "codes"):
        assert f"{picture}.png" in said and path.with_name(f"{picture}.png").exists()
    one = json.loads(path.read_text())["runs"]["trained"]
    assert one["images"] == 4
    assert len(one["probe"]) == 36 and all(r["n"] == 4 for r in one["probe"])  # the held-out images


def test_probe_refuses():
    saved = checkpoint(trained_run())
    renamed = altered(trained_run() / "checkpoint.pt", data=saved["data"] | {"classes": list("abcd")})
    write_images(workshop() / "single", classes=1)
    refuses_all(probe.main, f"""
        there is no file none       | none
        holds no class-conditional  | vq.pt
        trained with classes        | {renamed}
        one class alone             | runs/trained --data single
        same name                   | runs/trained runs/trained
        all                         | runs/trained --layers 9
        --images 1 at least 2       | runs/trained --images 1
        too few                     | runs/trained --train-images 1
        cannot write vq.pt          | runs/trained --out vq.pt
        does not exist              | runs/trained --data nowhere
        """)


# ---- fid.py ------------------------------------------------------------------------------------------------

def gaussian(x):
    return x.mean(0), np.cov(x, rowvar=False)


def test_fid_frechet_distance():
    """Against scipy's matrix square root, with fewer samples than features, as many, and more."""
    rng = np.random.default_rng(0)
    a, b, Q = rng.uniform(0.1, 2, 40), rng.uniform(0.1, 2, 40), rng.standard_normal((40, 40)) / 6
    for n in (30, 41, 400):
        x, y = rng.standard_normal((n, 40)) * a, rng.standard_normal((n + 5, 40)) @ Q * b + 0.3
        (mu1, s1), (mu2, s2) = gaussian(x), gaussian(y)
        root = scipy.linalg.sqrtm((s1 + 1e-12 * np.eye(40)) @ (s2 + 1e-12 * np.eye(40))).real
        oracle = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root)
        close(f"of {n} samples", fid.frechet_distance(mu1, s1, mu2, s2), oracle, 1e-4)
    refuses("negative eigenvalues", fid.frechet_distance, mu1, s1 - 9 * np.eye(40), mu2, s2)


def test_fid_moments_scores_and_bias():
    """Streamed moments equal numpy's far from zero; IS by hand, 0 log 0 = 0; the bias by simulation."""
    rng = np.random.default_rng(1)
    x, moments = 1000 + rng.standard_normal((101, 7)), fid.Moments()
    for part in torch.from_numpy(x).split(10):
        moments.add(part)
    for got, oracle in zip(moments.result(), gaussian(x)):
        close("moments", got, oracle, 1e-9)
    close("certain and diverse: the number of classes", fid.inception_score(np.eye(4)), 4)
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    kl = sum(p[i, j] * np.log(p[i, j] / p[:, j].mean()) for i in range(2) for j in range(2)) / 2
    close("IS", fid.inception_score(p), np.exp(kl))
    deviations = np.array([1, 2, 3])
    seen = [fid.frechet_distance(*gaussian(rng.standard_normal((300, 3)) * deviations),
                                 *gaussian(rng.standard_normal((700, 3)) * deviations)) for _ in range(500)]
    close("bias", fid.expected_distance(np.diag(deviations ** 2), 300, 700) / np.mean(seen), 1, 0.04)


def test_fid_precision_recall_brute_force():
    """Against loops over all pairs, in blocks of every size; copies and disjoint sets."""
    rng = np.random.default_rng(2)

    def inside(x, manifold, k):  # the share of x in the manifold
        radii = [sorted(np.square(a - b).sum() for b in manifold)[k] for a in manifold]
        return np.mean([any(np.square(a - b).sum() <= r for b, r in zip(manifold, radii)) for a in x])

    real, fake = rng.integers(0, 4, (25, 2)), rng.integers(0, 5, (30, 2))  # integers: many ties
    for k, block in ((3, 500), (1, 7)):
        expected = inside(fake, real, k), inside(real, fake, k)
        close(f"k = {k}", fid.precision_recall(real, fake, k, block), expected)
    x = rng.standard_normal((20, 600)).astype(np.float32).repeat(5, 0)  # each image five times: radii of zero
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)


def test_fid_resize_adm():
    """TensorFlow 1's bilinear from its definition, source = place * length / size, up and down."""
    def weights(length, size):
        rows = np.zeros((size, length))
        for i in range(size):
            low, share = divmod(i * length / size, 1)
            rows[i, int(low)] += 1 - share
            rows[i, min(int(low) + 1, length - 1)] += share
        return rows

    for H, W, size in ((5, 4, 9), (12, 17, 9), (9, 9, 9)):
        x = np.random.default_rng(H).integers(0, 256, (2, 3, H, W))
        expected = weights(H, size) @ x @ weights(W, size).T
        close(f"{H} x {W}", fid.resize_adm(torch.from_numpy(x).float(), size), expected)


@lru_cache(maxsize=1)
def inception_weights():
    """A file of weights drawn from bytes, which every numpy draws alike; small variances: epsilon counts."""
    draw, state = np.random.RandomState(0), {}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in sorted(fid.InceptionV3().state_dict().items())}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):  # as in files from before torch 0.4.1
            continue
        x = torch.frombuffer(bytearray(draw.bytes(math.prod(shape))), dtype=torch.uint8).view(shape) / 255
        if name.endswith("running_var"):
            x = 0.01 * (0.5 + x)
        elif name.endswith("running_mean"):
            x = 0.02 * (x - 0.5)
        elif name.endswith("bn.weight"):
            x = 0.5 + x
        elif len(shape) > 1:
            x = (x - 0.5) / 2 / math.sqrt(math.prod(shape[1:]))
        else:
            x = x - 0.5
        state[name] = x
    torch.save(state, workshop() / "inception.pth")
    return workshop() / "inception.pth"


# mean and deviation of pool3, its mean over Mixed_7c's pooled branch, the mean of the spatial features, the
# largest probability: of the image below, computed once with pytorch-fid's network on the same weights
PYTORCH_FID = {"adm": [2.279501, 3.242745, 2.948242, 1.953332, 0.004958],
               "pytorch-fid": [2.280985, 3.244854, 2.949859, 1.954922, 0.004963]}


def test_fid_inception_is_pytorch_fids():
    """Golden numbers: see padding in the averages, no max pool in Mixed_7c, another epsilon or range."""
    network, _ = fid.load_inception(inception_weights(), "")
    noise = np.frombuffer(np.random.RandomState(1).bytes(299 * 299 * 3), np.uint8).reshape(1, 299, 299, 3)
    pixels = noise // 4 + np.linspace(0, 190, 299).astype(np.uint8)[:, None, None]  # 299 px: not resized
    inside, seen = [], []
    network.Mixed_6d.register_forward_hook(lambda module, args, output: inside.append(output))
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for resize, golden in PYTORCH_FID.items():
        found = fid.inception_extractor(network, resize)(pixels)
        got = [found.pool.mean(), found.pool.std(), found.pool[:, -192:].mean(), found.spatial.mean(),
               found.probabilities.max()]
        assert np.allclose(got, golden, rtol=1e-4, atol=0), (resize, got)
        network.fc.bias.copy_(torch.randn(1008))  # the probabilities do not see it
    places_first = inside[-1][:, :7].flatten(2).mT.flatten(1)  # as ADM's statistics have them
    assert torch.equal(found.spatial, places_first)
    fid.inception_extractor(network, "pytorch-fid")(noise[:, :5, :7])
    x = torch.from_numpy(noise[:, :5, :7]).movedim(-1, 1).float()
    close("pytorch-fid's input", seen[-1], F.interpolate(x, (299, 299), mode="bilinear") / 127.5 - 1)


def mean_features(pixels):
    """A cheap extractor: 6 features, probabilities of 3 classes."""
    x = torch.from_numpy(pixels).double()
    pool = torch.cat([x.mean((1, 2)), x.std((1, 2))], 1)
    return fid.Features(pool.float(), pool[:, :2].float(), x.mean((1, 2)).softmax(1))


def test_fid_statistics():
    """No number depends on the batch; ADM's splits and its labels; no image is left out."""
    path, labels = scratch() / "x.npz", np.array([0, 1, 1, 2, 0, 0, 2, 2, 1, 0, 1])
    pixels = np.random.default_rng(3).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    np.savez_compressed(path, arr_0=pixels, arr_1=labels)
    exact = mean_features(pixels)
    p = exact.probabilities.numpy()
    for batch in (1, 3):
        with patch.object(fid, "SPLIT", 4):  # the shorter last split counts like the others
            got = fid.feature_statistics(fid.npz_side(path), mean_features, batch, 5)
        close("mean", got.moments["mu"], exact.pool.mean(0))
        close("spatial covariance", got.moments["sigma_s"], gaussian(exact.spatial.numpy())[1])
        close("agreement", got.agreement, np.mean(p.argmax(1) == labels))
        close("IS", got.score, np.mean([fid.inception_score(p[i:i + 4]) for i in (0, 4, 8)]))
        close("evenly spaced", got.features, exact.pool[[0, 2, 5, 7, 10]])
    np.savez(path, arr_0=pixels.astype("f4"))
    refuses("x.npz float32", fid.npz_side, path)
    many = fid.image_side(with_unreadable(3))
    refuses("no image out: 3.png", list, many.batches(50))  # though it is only one in 132


def a_real_side(split="train"):
    return fid.in_memory(fid.image_side(our_images(split), 16))


def test_fid_halves_and_floor():
    """The halves share no image and leave none out; the floor is evenly spaced; in no order of folders."""
    images, whole = our_images(), a_real_side()
    for counts, expected in (([60, 50], 22), ([60, 9], 9)):
        half, others = (fid.in_memory(side) for side in fid.real_halves(images, 16, None, counts))
        a, b, both = ([x.tobytes() for x in side.pixels] for side in (half, others, whole))
        assert sorted(a + b) == sorted(both) and len(a) == expected and b != sorted(b, key=both.index)
    floor, rows = fid.the_floor(images, 16, our_vq(), [20]), np.linspace(0, 43, 20).astype(int)[fid.mixed(20)]
    decoded = tokenizer.reconstruct(our_vq(), torch.from_numpy(whole.pixels[rows]))
    assert (floor.pixels == decoded.numpy()).all() and (floor.labels == whole.labels[rows]).all()


def test_fid_classifier():
    """Of the training images alone, twice the same; its accuracy is that on others."""
    side, held_out = a_real_side(), a_real_side("val")
    trained = fid.train_classifier(side, 12)
    found = fid.classifier_extractor(trained)(held_out.pixels).probabilities
    logits = trained(tokenizer.to_float(torch.from_numpy(held_out.pixels)))[1]
    close("probabilities", found, logits.softmax(1))
    held_out = replace(held_out, labels=found.argmax(1).numpy() + (np.arange(4) == 0))  # right on 3 of 4
    network, line = fid.load_classifier(fid.find_classifier(side, held_out, 12, scratch()), side)
    assert same(network.state_dict(), trained.state_dict())
    assert f"on 44 images of {side.name}" in line and "right on 75.0% of 4 held-out" in line


def test_what_the_classifier_learns_from():
    """Images shifted and mirrored, upright, each with its label."""
    side = a_real_side()
    side.pixels[:, 8:] = 0
    side.pixels[:, :8] = 100 + side.labels[:, None, None, None]  # light above, dark below
    for pixels, labels in fid.training_batches(side, 3, 32):
        assert (pixels[:, 4] == 100 + labels[:, None, None]).all() and not pixels[:, 11].any()


def scores(*argv):
    """The protocol of fid.py, as one text, and its rows."""
    run(fid.main, *argv, "--json", "scores.json")
    content = json.loads((workshop() / "scores.json").read_text())
    return "\n".join(content["protocol"] + content["warnings"]), content["scores"]


def test_fid_scores_samples_halves_and_the_floor():
    """fid.py from its command line: many rows, and decoded images as the reference of a named classifier."""
    root, side, vq = workshop(), a_real_side(), our_vq()
    np.savez(root / "good.npz", arr_0=side.pixels, arr_1=side.labels, classes=side.classes)
    np.savez(root / "few.npz", arr_0=side.pixels[:9])
    np.savez(root / "decoded.npz", arr_0=tokenizer.reconstruct(vq, torch.from_numpy(side.pixels)))
    (root / "scores.json").write_text("old")
    real = ["--real", "images", "--features", "classifier", "--vq", "vq.pt"]
    with replaced(root / "scores.json"):
        told, rows = scores(*real, "--classifier-steps", 10,
                            "--fake", "good.npz", "few.npz", "real-half", "reconstructions")
    good, few, half, floor = rows.values()
    assert abs(good["FD-c"]) < 1e-4 < floor["FD-c"]  # good.npz holds the training images themselves
    assert few["precision-c"] == 1 > few["recall-c"]
    assert few["class agreement"] is None is half["class agreement"]
    path = re.search(r"classifier: (\S+);", told)[1]
    extract = fid.classifier_extractor(fid.load_classifier(root / path, side)[0])
    nine, others = (fid.feature_statistics(some, extract)
                    for some in fid.real_halves(our_images(), 16, None, [44, 9]))
    close("FD-c of a half", half["FD-c"], fid.compare(others, nine, "-c")["FD-c"], 1e-4)
    told, rows = scores(*real, "--reference", "reconstructions", "--classifier", path,
                        "--fake", "decoded.npz")
    row = rows["decoded.npz"]  # the reference itself
    assert abs(row["FD-c"]) < 1e-4 and row["precision-c"] == row["recall-c"] == 1
    assert f"images train decoded by tokenizer {tokenizer.fingerprint(vq)}, 44 images" in told


def test_fid_of_two_folders_and_of_foreign_statistics():
    """As pytorch-fid: all images of two folders without classes; its statistics, if --resize says so."""
    root, weights = workshop(), inception_weights()
    pixels = np.random.default_rng(5).integers(0, 256, (2, 4, 8, 9, 3), dtype=np.uint8)
    for folder, images in zip(("a/all", "b"), pixels):  # one folder is no class either
        (root / folder).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / folder / f"{i}.png")
    extract = fid.inception_extractor(fid.load_inception(weights, "")[0], "pytorch-fid")
    real, fake = (gaussian(extract(images).pool.double().numpy()) for images in pixels)
    np.savez(root / "theirs.npz", mu=real[0], sigma=real[1])
    settings = ["--weights", "inception.pth", "--resize", "pytorch-fid", "--fake", "b"]
    for name, words in (("a", "real: a, 4 images of 9 x 8"), ("theirs.npz", "those of pytorch-fid")):
        told, rows = scores("--real", name, *settings)
        close(f"FID to {name}", rows["b"]["FID"], fid.frechet_distance(*real, *fake), 1e-4)
        assert words in told
    refuses("one class", run, fid.main, "--real", "a", "--fake", "b", "--features", "classifier")


def test_fid_likely_mistakes():
    """Each is one sentence, before any work."""
    root = workshop()
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(root / "eight.npz", arr_0=images, arr_1=np.array([0, 1, 2, 9]))
    np.savez(root / "six.npz", arr_0=images[:, :6])
    np.savez(root / "adm.npz", mu=np.ones(2), sigma=np.eye(2), mu_s=np.ones(2), sigma_s=np.eye(2))
    refuses_all(fid.main, """
        required: --fake             | --real images
        is empty                     | --real images --fake=
        need a folder                | --real eight.npz --fake real-half
        need a folder                | --real eight.npz --fake six.npz --subset none.txt
        does not exist               | --real nowhere --fake eight.npz
        mu_s ADM                     | --real adm.npz --fake eight.npz --resize pytorch-fid
        squares 8 x 6                | --real images --fake six.npz
        sizes 16 x 16 8 x 8          | --real images --fake eight.npz --image-size 16
        other classes                | --real images --fake eight.npz --features classifier
        give both                    | --real images --fake reconstructions
        10 4                         | --real images --fake reconstructions --vq vq.pt --image-size 10
        vq.pt InceptionV3            | --real images --fake eight.npz --weights vq.pt
        vq.pt classifier             | --real images --fake real-half --features classifier --classifier vq.pt
        ends in .json                | --real images --fake eight.npz --json eight.npz
        """, "--cache", "no-work")
    assert not (root / "no-work").exists()


# ---- Bad input: every script's command line, and damaged files ---------------------------------------------

class Hostile:
    """A pickle of this leaves a folder, `ran` in the workshop, where it is read carelessly."""

    def __reduce__(self):
        return os.mkdir, (str(workshop() / "ran"),)


def test_damaged_files_are_refused():
    """By every script that reads them, in one line with the file's name; no pickle in them ever runs."""
    root, folder = workshop(), trained_run()
    cache, = (root / "cache").glob("4-classes-train-16px-*")
    np.savez(root / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.arange(4))
    torch.save({"model": Hostile()}, root / "hostile.pt")
    resume, scoring = "--name trained --resume", "--real images --image-size 8 --fake samples.npz"
    for file, words, main, arguments in (
        (folder / "checkpoint.pt", "checkpoint.pt", sample.main, "runs/trained"),
        (folder / "checkpoint.pt", "checkpoint.pt", train.main, resume),
        (folder / "tokenizer.pt", "tokenizer.pt", train.main, resume),
        (cache / "tokens.npy", cache.name, probe.main, "runs/trained"),
        (root / "samples.npz", "samples.npz", fid.main, scoring),
    ):
        whole = file.read_bytes()
        for damaged in (b"", whole[:len(whole) // 2], (root / "hostile.pt").read_bytes()):
            file.write_bytes(damaged)
            refuses_all(main, f"{words} | {arguments}")
        file.write_bytes(whole)
    assert not (root / "ran").exists()


def test_a_mistake_is_one_line_on_the_screen():
    """The script's name and the sentence, and exit status 1 (that of SystemExit with a text)."""
    for name, *words in (("tokenizer", "train", "--data", "none", "--out", "x.pt"),
                         ("train", "--preset", "nano", "--device", "banana"), ("sample", "none.pt"),
                         ("probe", "none.pt"), ("fid", "--real", "none", "--fake", "none")):
        path = str(HERE / f"{name}.py")
        with patch.object(sys, "argv", [path, *words]), patch.dict(sys.modules, fcntl=None):  # as on Windows
            refuses(f"{name}.py: ", runpy.run_path, path, run_name="__main__")


# ---- results/ ----------------------------------------------------------------------------------------------

def test_table_of_results():
    """Three invented lines: means with half intervals by Student's t, and differences seed by seed."""
    made = runpy.run_path(str(HERE / "results" / "table.py"))  # which reads the real runs and writes nothing
    lines = {"AR": {0: 1.0, 1: 2.0, 2: 6.0}, "ST-AR": {0: 2.5, 2: 9.5}}
    text = made["table"](lines, {"score": (lambda line: 10 * line, 1)}, "AR")
    share = 0.975
    t = (2 * share - 1) / math.sqrt(2 * share * (1 - share))  # its quantile for two degrees of freedom
    half = t * math.sqrt((20 ** 2 + 10 ** 2 + 30 ** 2) / 2 / 3)  # around the mean of 30
    for row in (f"| AR | 3 | 30.0 ± {half:.1f} |", "| ST-AR | 2 | 25.0, 95.0 |",
                "| *ST-AR, less AR* | 2 | +15.0, +35.0 |"):
        assert row in text.splitlines(), text


# ---- Documents ---------------------------------------------------------------------------------------------

DOCUMENTS = {path: path.read_text("utf-8") for path in sorted({*HERE.glob("*.md"), *HERE.glob("*/*.md")})}
SCRIPTS = "fid|losses|model|probe|sample|tokenizer|train"


def test_documents_name_what_exists():
    """Every function `script.name`, every file that is linked, every flag of a command."""
    texts = DOCUMENTS | {HERE / "losses.py": losses.__doc__, HERE / "probe.py": probe.__doc__}
    for path, text in texts.items():
        for script, name in re.findall(rf"(?:`|  )({SCRIPTS})\.(?!py|pt|json)(\w+)", text):
            assert hasattr(sys.modules[script], name), f"{path.name}: there is no {script}.{name}"
        for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
            assert (path.parent / link).exists(), f"{path.name}: no file {link}"
    for script in ("fid", "probe", "sample", "tokenizer", "train"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            sys.modules[script].main(["--help"])
        known = set(re.findall(r"--[\w-]+", said.getvalue()))
        for path, text in DOCUMENTS.items():
            for words in re.findall(rf"{script}\.py((?: \\\n|[^`\n#|;&])*)", text):
                unknown = set(re.findall(r"--[a-z][\w-]*", words)) - known
                assert not unknown, f"{path.name}: {script}.py has no {unknown}"


def test_exercises_fit_the_code():
    """Every line that an exercise takes out stands in the code."""
    code = "".join(path.read_text("utf-8") for path in HERE.glob("*.py")).splitlines()
    pages = "".join(text for path, text in DOCUMENTS.items() if path.parent.name == "coursework")
    removed = re.findall(r"^-(.*)$", "".join(re.findall(r"```diff\n(.*?)```", pages, re.S)), re.M)
    missing = [line for line in removed if line not in code]
    assert removed and not missing, missing


# ---- On a GPU only; what they need of the CPU is tested above ----------------------------------------------

def cuda_test_a_compiled_bfloat16_step_against_float32():
    """The same batch through a compiled bfloat16 step and the CPU's: every loss to 2 %, the norm to 5 %."""
    config, logs = a_config(), {}
    for name, wrap in (("cpu", lambda module: module), ("cuda", torch.compile)):
        device, objective = torch.device(name), an_objective(config)
        run = a_run(config, objective.to(device))._replace(
            device=device, dtype=torch.bfloat16 if name == "cuda" else None)
        logs[name] = train.train_step(run, wrap(objective), train.load_batch(run, 0), 0)
    for name in ("loss", "loss_ar", "loss_mim", "loss_step", "loss_view", "grad_norm"):
        expected, value = logs["cpu"][name].item(), logs["cuda"][name].item()
        tolerance = 0.05 if name == "grad_norm" else 0.02
        assert abs(value - expected) < tolerance * expected, (name, expected, value)


def cuda_test_sampling_as_a_graph():
    """Replayed and eager steps agree, also for a smaller batch: greedy tokens in float32; bfloat16 runs."""
    net = tiny_model().cuda()
    begin = sample.recorded(net, 6)
    for classes in (torch.tensor([0, 3, 4], device="cuda"), torch.tensor([1, 2], device="cuda")):
        graph = sample.generate(net, classes, cfg=2.0, temperature=0, begin=begin)
        assert torch.equal(graph, sample.generate(net, classes, cfg=2.0, temperature=0))
    sample.to_bfloat16(net)
    assert sample.generate(net, classes, begin=sample.recorded(net, 2)).max() < 11


def cuda_test_from_training_to_scores():
    """Trained, resumed, sampled, probed, scored; two steps and two more are the four of a run in one go."""
    gpu = ["--device", "cuda"]
    settings = [*SMALL, *gpu, "--schedule", "constant", "--no-ema-ramp"]
    run(train.main, *settings, "--name", "gpu", "--steps", 2)
    run(train.main, "--name", "gpu", "--resume", "--steps", 4)
    run(train.main, *settings, "--name", "in-one-go", "--steps", 4)
    assert [line["step"] for line in metrics("gpu")] == [1, 2, 3, 4]
    for a, b in zip(metrics("in-one-go"), metrics("gpu")):
        close(f"loss of step {a['step']}", b["loss"], a["loss"], 0.02)
        assert a["memory_gb"] > 0
    run(sample.main, "runs/gpu", *gpu, "--num-images", 12, "--batch", 5, "--cfg", 2, "--npz", "gpu.npz")
    assert "layer" in run(probe.main, "runs/gpu", *gpu, "--images", 4)
    scored = run(fid.main, *gpu, "--real", "images", "--fake", "gpu.npz", "real-half",
                 "--features", "classifier", "--classifier-steps", 10)
    assert "nan" not in scored and "FD-c" in scored


def cuda_test_all_gpus_equal_the_cpu():
    """A step of as many processes as there are GPUs, over NCCL: each loss to 2 % of the CPU's."""
    trained_run()
    processes = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    settings = [*SMALL, "--device", "cuda", "--name", "nccl", "--steps", 1]
    assert finish(launch("train.py", *settings, processes=processes))
    for name, value in metrics("trained")[0].items():
        if "loss" in name or name == "negatives":
            close(name, metrics("nccl")[0][name], value, 0.02)


# ---- The runner --------------------------------------------------------------------------------------------

def main():
    words, kinds, failed, skipped = sys.argv[1:], ("test_", "cuda_test_"), 0, 0
    tests = {name: test for name, test in globals().items()
             if name.startswith(kinds) and any(word in name for word in words or [""])}
    for name, test in tests.items():
        if name.startswith("cuda") and not torch.cuda.is_available():
            skipped += 1
            continue
        start, printed, found, result = time.time(), io.StringIO(), None, "ok    "
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                found = test()
        except (Exception, SystemExit):
            failed += 1
            result, found = "FAILED", f"{printed.getvalue()[-2000:]}\n{traceback.format_exc()}"
        title = name.partition("_")[2].replace("_", " ")
        print(f"{result} {time.time() - start:5.1f} s  {title}", *[found] * bool(found), sep="\n", flush=True)
    if skipped:
        print(f"no GPU here: {skipped} test(s) skipped")
    print(f"{len(tests) - failed - skipped} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
