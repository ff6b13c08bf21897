"""All tests: oracles, closed forms and invariants of every file, and real runs that are killed, resumed and split.

    python test_all.py            # everything, offline, under 3 minutes on 2 CPU cores
    python test_all.py nce mask   # only tests whose name contains one of these words

Also collected by pytest. The last line is "N passed, N failed".
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import losses
import model
import probe
import sample
import tokenizer
import train

HERE = Path(__file__).resolve().parent


def refuses(error, words, call, *args, **kwargs):
    """Assert that call(...) raises `error` in one line that contains all `words`."""
    try:
        call(*args, **kwargs)
    except error as caught:
        text = str(caught)
        assert "\n" not in text and all(word in text for word in words.split()), text
    else:
        raise AssertionError(f"{call.__name__} did not refuse")


def tiny_model(seed=0, head=True, **changes):
    """A model of 3 layers on a 4 x 4 grid, with a random head, so that logits say something."""
    torch.manual_seed(seed)
    config = dict(n_layer=3, n_head=2, dim=32, vocab_size=11, num_classes=5, num_tokens=16, dropout=0.0) | changes
    net = model.Transformer(model.ModelConfig(**config)).eval()
    for p in net.parameters():  # far larger than the initial 0.02: attention that is not flat, logits that differ
        p.data += 0.2 * torch.randn_like(p) * (p.ndim > 1)
    return net


def some_tokens(batch=3, count=15, vocab=11, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, count), generator=g), torch.randint(5, (batch,), generator=g)


def write_images(root, classes=4, each=12, size=32, seed=0):
    """root/<class>/<i>.png of the built-in shapes."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(each):
            tokenizer.draw_shape(label, (seed, label, i), size).save(root / f"class{label}" / f"{i:02d}.png")


@lru_cache(maxsize=1)
def workshop():
    """A folder with 48 images in 4 classes and a barely trained tokenizer, made once for all tests that run scripts."""
    holder = tempfile.TemporaryDirectory()
    root = Path(holder.name)
    write_images(root / "images")
    config = tokenizer.replace(tokenizer.VQ_CONFIGS["vq_ds4"], codebook_size=64)
    with contextlib.redirect_stderr(io.StringIO()):
        vq = tokenizer.train_tokenizer(tokenizer.open_images(root / "images"), 16, config, steps=60, batch=8)
    tokenizer.save_tokenizer(root / "vq.pt", vq)
    return holder, root


def script(name, *args, processes=1, popen=False):
    """Run one of the scripts in the workshop; with `popen` return the running process."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [*launch, str(HERE / name), *map(str, args)]
    how = dict(cwd=workshop()[1], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, **how) if popen else subprocess.run(command, **how, timeout=150)


SMALL = ["--preset", "nano", "--data", "images", "--tokenizer", "vq.pt", "--image-size", "16", "--batch", "8",
         "--dropout", "0", "--warmup", "0", "--log-every", "1", "--eval-images", "4", "--samples", "2"]


def run_train(name, *args, **how):
    return script("train.py", *SMALL, "--name", name, *args, **how)


def checkpoint(name):
    return torch.load(workshop()[1] / "runs" / name / "checkpoint.pt", weights_only=True)


def metrics(name):
    path = workshop()[1] / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(a, b):
    """Bit-identical trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- tokenizer.py ------------------------------------------------------------------------------------------

def test_reader_layouts():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "plain")
        whole, held = (tokenizer.open_images(root / "plain", split) for split in ("train", "val"))
        assert len(whole) == 44 and len(held) == 4 and not set(whole.names) & set(held.names)
        assert sorted(held.labels.tolist()) == [0, 1, 2, 3]
        write_images(root / "imagenet" / "train")
        write_images(root / "imagenet" / "val", each=3)
        assert len(tokenizer.open_images(root / "imagenet")) == 48
        assert len(tokenizer.open_images(root / "imagenet", "val")) == 12
        tiny = root / "tiny.zip"  # Tiny ImageNet's layout, inside one top folder
        with zipfile.ZipFile(tiny, "w") as archive:
            archive.writestr("t/wnids.txt", "n2\nn1\n")
            archive.writestr("t/words.txt", "n1\tgoldfish, Carassius\nn2\tlion\nn3\tother\n")
            archive.writestr("t/val/val_annotations.txt", "v0.JPEG\tn2\t0\t0\t9\t9\nv1.JPEG\tn1\t0\t0\t9\t9\n")
            for name, mode in (("train/n1/images/a", "L"), ("train/n2/images/b", "CMYK"), ("val/images/v0", "RGB"),
                               ("val/images/v1", "RGB")):
                data = io.BytesIO()
                Image.new(mode, (20, 30), 100 if mode == "L" else None).save(data, "JPEG")
                archive.writestr(f"t/{name}.JPEG", data.getvalue())
        images, val = tokenizer.open_images(tiny), tokenizer.open_images(tiny, "val")
        assert images.classes == ["goldfish", "lion"] and images.labels.tolist() == [0, 1]
        assert val.labels.tolist() == [1, 0] and images.fingerprint != val.fingerprint
        assert all(images.read(i).mode == "RGB" and images.read(i).size == (20, 30) for i in range(2))


def test_reader_refuses_in_one_sentence():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        refuses(FileNotFoundError, "does not exist", tokenizer.open_images, root / "nowhere")
        refuses(ValueError, "holds 0 image", tokenizer.open_images, root)
        write_images(root / "one", classes=1, each=1)
        refuses(ValueError, "holds 1 image", tokenizer.open_images, root / "one")
        (root / "half.zip").write_bytes(b"PK\x03\x04 and then the connection broke")
        refuses(ValueError, "half.zip zip", tokenizer.open_images, root / "half.zip")
        write_images(root / "bad", classes=2, each=3)
        (root / "bad" / "class1" / "00.png").write_bytes(b"")
        bad = tokenizer.open_images(root / "bad")
        i = bad.names.index("class1/00.png") if "class1/00.png" in bad.names else None
        bad, i = (bad, i) if i is not None else (tokenizer.open_images(root / "bad", "val"), 0)
        refuses(ValueError, "class1/00.png not a readable image", bad.read, i)


def test_shapes_are_a_function_of_their_index():
    a, b = tokenizer.open_images("shapes"), tokenizer.open_images("shapes")
    assert len(a.classes) >= 10 and a.fingerprint == b.fingerprint
    assert np.array_equal(a.read(17), b.read(17)) and not np.array_equal(a.read(17), a.read(29))
    assert not np.array_equal(a.read(0), tokenizer.open_images("shapes", "val").read(0))


def test_ten_crops():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(281, 281, 3), dtype=np.uint8))
    p = np.asarray(image)
    crops = tokenizer.ten_crops(image, 256, 1.1)
    assert crops.shape == (10, 256, 256, 3)
    assert np.array_equal(crops[0], p[:256, :256]) and np.array_equal(crops[3], p[25:, 25:])
    assert np.array_equal(crops[1], p[:256, 25:]) and np.array_equal(crops[2], p[25:, :256])
    assert np.array_equal(crops[4], p[12:268, 12:268])  # 12.5 is rounded half to even
    assert np.array_equal(crops[5], crops[1][:, ::-1])  # crops of the mirror image, not mirrored crops:
    assert not np.array_equal(crops[9], crops[4][:, ::-1])  # with an odd margin the centres differ
    wide = Image.fromarray(rng.integers(256, size=(70, 300, 3), dtype=np.uint8))
    assert tokenizer.center_crop(wide, 32).size == (32, 32)
    assert tokenizer.views(wide, 32, (1.1, 1.05)).shape == (20, 32, 32, 3)
    assert tokenizer.views(wide, 32, ()).shape == (1, 32, 32, 3)


def test_pixels_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert (tokenizer.to_uint8(tokenizer.to_float(pixels)).int() - pixels.int()).abs().max() <= 1
    assert tokenizer.to_uint8(torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2)).flatten().tolist() == [0, 128, 255, 255]


def test_vq_ds16_has_llamagens_structure():
    with torch.device("meta"):
        vq = tokenizer.VQModel(tokenizer.VQ_CONFIGS["vq_ds16"])
    assert sum(p.numel() for p in vq.parameters()) == 71_883_403
    shapes = {name: tuple(tensor.shape) for name, tensor in vq.state_dict().items()}
    for name, shape in {"quantize.embedding.weight": (16384, 8), "quantize.codebook_used": (65536,),
                        "encoder.conv_blocks.4.attn.1.proj_out.weight": (512, 512, 1, 1),
                        "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
                        "encoder.conv_blocks.3.downsample.conv.weight": (256, 256, 3, 3),
                        "decoder.conv_blocks.0.res.2.conv1.weight": (512, 512, 3, 3),
                        "decoder.conv_blocks.3.upsample.conv.bias": (128,), "decoder.mid.1.q.weight": (512, 512, 1, 1),
                        "decoder.conv_in.weight": (512, 256, 3, 3), "quant_conv.weight": (8, 256, 1, 1)}.items():
        assert shapes[name] == shape, name
    assert "decoder.conv_blocks.4.upsample.conv.weight" not in shapes


def test_quantizer_is_nearest_code_with_straight_through_gradient():
    torch.manual_seed(0)
    quantize = tokenizer.VectorQuantizer(tokenizer.VQConfig(codebook_size=50))
    z = torch.randn(2, 8, 3, 3, requires_grad=True)
    z_q, indices, loss = quantize(z)
    unit, codes = F.normalize(z, dim=1), quantize.codebook()
    for b in range(2):
        for t in range(9):
            v = unit[b, :, t // 3, t % 3]
            nearest = min(range(50), key=lambda n: (v - codes[n]).square().sum().item())
            assert indices[b, t] == nearest and torch.allclose(z_q[b, :, t // 3, t % 3], codes[nearest], atol=1e-6)
    assert torch.allclose(loss, 1.25 * F.mse_loss(unit, z_q))  # codebook + 0.25 commitment, equal in value
    weight = torch.randn_like(z_q)
    through, = torch.autograd.grad((z_q * weight).sum(), z, retain_graph=True)
    direct, = torch.autograd.grad((unit * weight).sum(), z)
    assert torch.allclose(through, direct, atol=1e-6)


def test_dead_codes_are_restarted():
    quantize = tokenizer.VectorQuantizer(tokenizer.VQConfig(codebook_size=10))
    before, latents = quantize.embedding.weight.clone(), torch.randn(20, 8)
    quantize.restart(torch.arange(10) >= 7, latents)
    assert torch.equal(quantize.embedding.weight[:7], before[:7])
    distance = torch.cdist(quantize.embedding.weight[7:], F.normalize(latents, dim=-1))
    assert distance.min(1).values.max() < 1e-5


def test_tokenizer_learns():
    """60 steps on 44 images: clearly better than grey, with several codes in use."""
    _, root = workshop()
    vq, images = tokenizer.load_tokenizer(root / "vq.pt"), tokenizer.open_images(root / "images", "val")
    pixels = tokenizer.held_out_pixels(images, 16, 10)
    grey = (pixels.float() / 255 - 0.5).square().flatten(1).mean(1)
    quality = tokenizer.evaluate_tokenizer(vq, pixels)
    assert quality["psnr"] > -10 * grey.log10().mean() + 1 and 1 < quality["perplexity"] <= 64
    codes = vq.encode(tokenizer.to_float(pixels))
    assert codes.shape == (4, 16) and vq.decode(codes).shape == (4, 3, 16, 16)
    assert torch.allclose(vq.decode(codes), vq(tokenizer.to_float(pixels))[0], atol=1e-5)


def test_cache_shards_resumes_and_refuses():
    _, root = workshop()
    vq, images = tokenizer.load_tokenizer(root / "vq.pt"), tokenizer.open_images(root / "images")
    kept_chunk, kept_environment = tokenizer.CHUNK, dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(folder)
        tokenizer.build_cache(folder / "one", images, vq, 16, (1.1,))
        one = tokenizer.load_cache(folder / "one")
        assert one.tokens.shape == (44, 10, 16) and one.tokens.dtype == np.uint16
        view = tokenizer.ten_crops(images.read(5), 16, 1.1)[7]
        assert np.array_equal(one.tokens[5, 7], vq.encode(tokenizer.to_float(torch.from_numpy(view)[None]))[0])
        try:
            tokenizer.CHUNK = 10  # five parts, of which "rank 1" writes two, then rank 0 the rest
            os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
            tokenizer.build_cache(folder / "two", images, vq, 16, (1.1,))
            refuses(FileNotFoundError, "no finished token cache", tokenizer.load_cache, folder / "two")
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
            tokenizer.build_cache(folder / "two", images, vq, 16, (1.1,))
        finally:
            tokenizer.CHUNK = kept_chunk
            os.environ.clear()
            os.environ.update(kept_environment)
        two = tokenizer.load_cache(folder / "two")
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.labels, two.labels)
        assert sorted(path.name for path in (folder / "two").iterdir()) == ["labels.npy", "meta.json", "tokens.npy"]
        refuses(ValueError, "image_size 16 12", tokenizer.build_cache, folder / "two", images, vq, 12, (1.1,))
        refuses(ValueError, "18 multiple 4", tokenizer.build_cache, folder / "x", images, vq, 18, (1.1,))


def test_corrupt_images_are_skipped_only_if_asked():
    _, root = workshop()
    vq = tokenizer.load_tokenizer(root / "vq.pt")
    with tempfile.TemporaryDirectory() as folder:
        folder, said = Path(folder), io.StringIO()
        write_images(folder / "images", each=2)
        broken = tokenizer.open_images(folder / "images").names[1]
        (folder / "images" / broken).write_bytes(b"\x89PNG and no more")
        images = tokenizer.open_images(folder / "images")
        with contextlib.redirect_stderr(said):
            refuses(ValueError, broken, tokenizer.build_cache, folder / "a", images, vq, 16, (1.1,))
            tokenizer.build_cache(folder / "b", images, vq, 16, (1.1,), skip_corrupt=True)
        labels = tokenizer.load_cache(folder / "b").labels
        assert labels[1] == -1 and (labels >= 0).sum() == len(images) - 1 and broken in said.getvalue()


def test_tokenizer_files_of_another_kind():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        refuses(FileNotFoundError, "no tokenizer", tokenizer.load_tokenizer, path)
        path.write_bytes(b"no weights")
        refuses(ValueError, "x.pt damaged or no file of weights", tokenizer.load_tokenizer, path)
        torch.save({"model": tiny_model().state_dict()}, path)
        refuses(ValueError, "a transformer expected VQ", tokenizer.load_tokenizer, path)


def test_write_file_keeps_the_old_on_failure():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        tokenizer.write_file(path, lambda file: file.write(b"old"))

        def fail(file):
            file.write(b"ne")
            raise OSError(28, "No space left on device")

        refuses(OSError, "cannot write No space left", tokenizer.write_file, path, fail)
        assert path.read_bytes() == b"old" and len(list(Path(folder).iterdir())) == 1


# ---- model.py ----------------------------------------------------------------------------------------------

def test_parameter_counts_are_llamagens():
    for name, count in {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672}.items():
        with torch.device("meta"):
            net = model.Transformer(model.ModelConfig(*model.SIZES[name]))
        assert sum(p.numel() for p in net.parameters()) == count
        assert "layers.3.attention.wqkv.weight" in net.state_dict() and "rope" not in net.state_dict()


def test_first_loss_is_ln_v():
    net = model.Transformer(model.ModelConfig(2, 2, 32, vocab_size=37, num_tokens=16))
    tokens, classes = some_tokens(count=16, vocab=37)
    loss = losses.ar_loss(net(tokens[:, :-1], classes).logits, tokens)
    assert abs(loss.item() - math.log(37)) < 1e-5


def test_causality():
    net, (tokens, classes) = tiny_model(), some_tokens()
    a = net(tokens, classes).logits
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11  # token x_10 is at position 10
    b = net(changed, classes).logits
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.allclose(a[:, 10], b[:, 10])


def test_masked_key_has_no_influence():
    """Eq. 3: with key 7 hidden, token 7 reaches only its own position, through the residual stream."""
    net, (tokens, classes) = tiny_model(), some_tokens()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 7] = True
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 11
    others = torch.arange(16) != 7
    for mask_it, unmoved in ((mask, True), (torch.zeros_like(mask), False)):
        a, b = net(tokens, classes, key_mask=mask_it).logits, net(changed, classes, key_mask=mask_it).logits
        assert torch.allclose(a[:, others], b[:, others], atol=1e-6) == unmoved
        assert not torch.allclose(a[:, 7], b[:, 7], atol=1e-3)
    everything = torch.ones(3, 16, dtype=torch.bool)
    everything[:, 0] = False  # all but the class token: the emptiest rows there are
    assert net(tokens, classes, key_mask=everything).logits.isfinite().all()


def test_explicit_attention_equals_fused():
    net, (tokens, classes) = tiny_model(), some_tokens()
    mask = losses.sample_key_mask(3, 16, 0.4, torch.Generator().manual_seed(0))
    for key_mask in (None, mask):
        fused = net(tokens, classes, key_mask=key_mask, layers=(1, 2, 3))
        explicit = net(tokens, classes, key_mask=key_mask, layers=(1, 2, 3), return_attention=True)
        assert torch.allclose(fused.logits, explicit.logits, atol=1e-5)
        assert all(torch.allclose(fused.hidden[n], explicit.hidden[n], atol=1e-5) for n in (1, 2, 3))
        for weights in explicit.attention:  # (B, H, T, T)
            assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 16)) and weights.triu(1).abs().max() == 0
            if key_mask is not None:
                assert weights.masked_select(mask[:, None, None, :].expand_as(weights)).abs().max() == 0


def test_attention_against_the_formula():
    """One layer by hand: complex rotation by 2D positions, zero class query and key, softmax(Q K^T / sqrt(D)) V."""
    net, (tokens, classes) = tiny_model(), some_tokens(batch=1)
    x = torch.cat([net.cls_embedding["embedding_table"](classes)[:, None], net.tok_embeddings(tokens)], 1)
    layer = net.layers[0]
    qkv = layer.attention.wqkv(layer.attention_norm(x))[0].view(16, 3, 2, 16)
    turn = torch.zeros(16, 8, dtype=torch.complex64)  # position 0, the class: factor zero
    for p in range(1, 16):
        row, column = divmod(p - 1, 4)
        for j in range(4):
            frequency = 10000.0 ** (-2 * j / 8)
            turn[p, j] = complex(math.cos(row * frequency), math.sin(row * frequency))
            turn[p, 4 + j] = complex(math.cos(column * frequency), math.sin(column * frequency))
    expected = torch.zeros(16, 2, 16)
    for h in range(2):
        q, k = (torch.view_as_real(torch.view_as_complex(qkv[:, i, h].reshape(16, 8, 2)) * turn).flatten(1)
                for i in (0, 1))
        for p in range(16):
            weights = torch.softmax(torch.stack([q[p] @ k[s] / 4 for s in range(p + 1)]), 0)
            expected[p, h] = sum(w * qkv[s, 2, h] for s, w in enumerate(weights))
    y = layer.attention.wo(expected.flatten(1))
    after = x[0] + y
    after = after + layer.feed_forward(layer.ffn_norm(after))
    assert torch.allclose(net(tokens, classes, layers=(1,), head=False).hidden[1][0], after, atol=1e-4)


def test_cached_equals_uncached():
    net, (tokens, classes) = tiny_model(), some_tokens()
    whole, cache = net(tokens, classes).logits, net.new_cache(3)
    parts = [net(tokens[:, :n], classes, cache=cache).logits for n in (0, 1, 2, 5, 6, 15)]  # steps of 1, 3 and 9 too
    assert [part.shape[1] for part in parts] == [1, 1, 1, 3, 1, 9]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_layers_and_head_are_only_what_is_asked_for():
    net, (tokens, classes) = tiny_model(), some_tokens()
    full = net(tokens, classes, layers=(2, 3))
    calls = []
    net.layers[2].register_forward_hook(lambda *_: calls.append(1))
    part = net(tokens, classes, layers=(2,), head=False)
    assert part.logits is None and not calls and torch.equal(part.hidden[2], full.hidden[2])


def test_checkpoints_of_both_kinds():
    net, (tokens, classes) = tiny_model(), some_tokens()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        ours = {"model": net.state_dict(), "ema": tiny_model(seed=9).state_dict(), "step": 3,
                "model_config": vars(net.config)}
        torch.save(ours, path)
        again, rest = model.load_model(path)
        assert torch.equal(again(tokens, classes).logits, net(tokens, classes).logits) and rest["step"] == 3
        assert not torch.equal(model.load_model(path, ema=True)[0](tokens, classes).logits, net(tokens, classes).logits)

        model.SIZES["test"] = (3, 2, 32)  # LlamaGen's files do not say how many heads there are
        try:
            state = net.state_dict()
            for content in (state, {"model": state, "args": argparse.Namespace(image_size=64, downsample_size=16)},
                            {"model": state | {"freqs_cis": torch.zeros(17, 8, 2)}, "steps": 7}):
                torch.save(content, path)
                again, _ = model.load_model(path, image_size=64)
                assert torch.equal(again(tokens, classes).logits, net(tokens, classes).logits)
            refuses(ValueError, "no EMA", model.load_model, path, ema=True)
            torch.save(state | {"surprise": torch.zeros(1)}, path)
            refuses(ValueError, "does not fit surprise", model.load_model, path)
        finally:
            del model.SIZES["test"]
        torch.save(state, path)
        refuses(ValueError, "3 layers width 32", model.load_model, path)
        torch.save({"model": {"tok_embeddings.weight": torch.zeros(1), "cls_embedding.uncond_embedding": torch.zeros(1)}},
                   path)
        refuses(ValueError, "text-conditional", model.load_model, path)
        torch.save({"model": {"quantize.embedding.weight": torch.zeros(1)}}, path)
        refuses(ValueError, "a VQ tokenizer", model.load_model, path)
        path.write_bytes(b"not weights")
        refuses(ValueError, "damaged or no file of weights", model.load_model, path)
        refuses(FileNotFoundError, "no checkpoint", model.load_model, Path(folder) / "y.pt")


# ---- losses.py ---------------------------------------------------------------------------------------------

def test_key_masks():
    mask = losses.sample_key_mask(50, 64, 0.25, torch.Generator().manual_seed(0))
    assert mask.shape == (50, 64) and (mask.sum(1) == round(0.25 * 63)).all() and not mask[:, 0].any()
    assert mask.float().mean(0)[1:].min() > 0  # every position is hidden now and then
    for ratio in (-0.1, 1.0, float("nan")):
        refuses(ValueError, "mask ratio", losses.sample_key_mask, 2, 64, ratio, torch.Generator())


def test_positions():
    seen = set()
    for seed in range(200):
        positions = losses.sample_positions(16, 4, torch.Generator().manual_seed(seed)).tolist()
        assert len(set(positions)) == 4
        seen |= set(positions)
    assert seen == set(range(1, 16))
    refuses(ValueError, "K = 16", losses.sample_positions, 16, 16, torch.Generator())


def test_mim_loss():
    h = torch.randn(2, 5, 8)
    assert losses.mim_loss(h, 3 * h).abs() < 1e-6 and abs(losses.mim_loss(h, -h) - 2) < 1e-6
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    assert abs(losses.mim_loss(a, b).item() - (1 - 1 / math.sqrt(2))) < 1e-6


def nce_by_hand(anchor, targets, positive, temperature):
    """-log softmax of one anchor over its candidates, in plain Python numbers."""
    scores = [F.cosine_similarity(anchor, target, dim=0).item() / temperature for target in targets]
    return -scores[positive] + math.log(sum(math.exp(score) for score in scores))


def test_info_nce_is_the_double_loop():
    torch.manual_seed(0)
    a, t = torch.randn(3, 4, 6), torch.randn(3, 12, 6)
    loss, accuracy = losses.info_nce(a, t, 0.3, offset=4)
    expected = np.mean([nce_by_hand(a[s, b], t[s], 4 + b, 0.3) for s in range(3) for b in range(4)])
    assert abs(loss.item() - expected) < 1e-5 and 0 <= accuracy <= 1
    assert losses.info_nce(t, t, 0.1)[1] == 1


def test_step_and_view_losses_are_equations_6_and_7():
    torch.manual_seed(0)
    V, K, B, C = 2, 3, 4, 6
    z, h = torch.randn(V, K, B, C), torch.randn(V, K, B, C)
    step = [nce_by_hand(z[m, i, b], h[m, j], b, 0.2)
            for m in range(V) for i in range(K) for j in range(K) if i != j for b in range(B)]
    view = [nce_by_hand(z[i, k, b], h[j, k], b, 0.2)
            for i in range(V) for j in range(V) if i != j for k in range(K) for b in range(B)]
    assert abs(losses.step_loss(z, h, 0.2)[0].item() - np.mean(step)) < 1e-5
    assert abs(losses.view_loss(z, h, 0.2)[0].item() - np.mean(view)) < 1e-5
    refuses(ValueError, "K >= 2", losses.step_loss, z[:, :1], h[:, :1], 0.2)
    refuses(ValueError, "V >= 2", losses.view_loss, z[:1], h[:1], 0.2)


def test_total_loss():
    terms = {name: torch.tensor(value) for name, value in (("ar", 1.0), ("mim", 10.0), ("step", 100.0), ("view", 300.0))}
    assert losses.total_loss(terms, 0.5, 0.1) == 1 + 5 + 20
    assert losses.total_loss({"ar": terms["ar"], "view": terms["view"]}, 0.5, 0.1) == 1 + 15  # the /2 stays


def test_label_accuracy():
    assert abs(losses.label_accuracy(torch.tensor([1, 1, 2, 3])).item() - (0.5 + 0.5 + 1 + 1) / 4) < 1e-6


def test_ema_and_no_gradient_for_the_teacher():
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    old, new = teacher.weight.clone(), student.weight.clone()
    losses.update_ema(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, 0.9 * old + 0.1 * new) and torch.equal(student.weight, new)
    z, h = torch.randn(2, 2, 3, 4, requires_grad=True), torch.randn(2, 2, 3, 4, requires_grad=True)
    (losses.step_loss(z, h, 0.2)[0] + losses.view_loss(z, h, 0.2)[0] + losses.mim_loss(z[0], h[0])).backward()
    assert z.grad.abs().sum() > 0 and h.grad is None


# ---- train.py ----------------------------------------------------------------------------------------------

def a_config(**changes):
    return train.Config(**dict(model="nano", depth=2, batch=8, data="images", device="cpu", image_size=16) | changes)


def a_cache(images=20, views=10, tokens=16):
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 4
    labels[3] = -1  # an image that could not be read
    codes = rng.integers(11, size=(images, views, tokens)).astype(np.uint16)
    return tokenizer.TokenCache(codes, labels, {"classes": list("abcd"), "codebook_size": 11})


def test_batches_do_not_depend_on_the_number_of_processes():
    config, cache = a_config(class_dropout=0.5), a_cache()
    whole = train.draw_batch(config, cache, 5, 0, 1)
    parts = [train.draw_batch(config, cache, 5, part, 4) for part in range(4)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.classes, torch.cat([part.classes for part in parts]))
    assert torch.equal(whole.key_mask, torch.cat([part.key_mask for part in parts]))
    assert all(torch.equal(whole.positions, part.positions) for part in parts)
    assert same(list(whole), list(train.draw_batch(config, cache, 5, 0, 1)))
    assert not torch.equal(whole.key_mask, train.draw_batch(config, cache, 6, 0, 1).key_mask)


def test_an_epoch_visits_each_image_once_with_different_views():
    config, cache = a_config(class_dropout=0.0, batch=5), a_cache()
    key = {tuple(cache.tokens[i, v]): (i, v) for i in range(20) for v in range(10)}
    for epoch in range(2):
        seen = []
        for step in range(3):  # 19 readable images, batches of 5
            batch = train.draw_batch(config, cache, 3 * epoch + step, 0, 1)
            for views, label in zip(batch.tokens.tolist(), batch.classes.tolist()):
                (i, a), (j, b) = (key[tuple(view)] for view in views)
                assert i == j and a != b and label == cache.labels[i]
                seen.append(i)
        assert len(set(seen)) == 15 and 3 not in seen


def a_student(config, seed=0):
    net = tiny_model(seed, n_layer=4, dim=96, n_head=3, num_classes=4).train()
    return train.Student(net, config.depth, "step" in config.losses or "view" in config.losses)


def test_which_loss_runs_what():
    """An AR run has no teacher forward and no mask; masking is on exactly when L_MIM is."""
    batch = train.draw_batch(a_config(), a_cache(), 0, 0, 1)
    for on in ("ar", "ar+mim", "ar+step", "ar+step+view", "ar+mim+step+view"):
        config, masks, teacher_calls = a_config(losses=on), [], []
        student, teacher = a_student(config), tiny_model(5, n_layer=4, dim=96, n_head=3, num_classes=4)
        student.model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["key_mask"]), with_kwargs=True)
        teacher.register_forward_hook(lambda module, args, kwargs, out: teacher_calls.append(kwargs), with_kwargs=True)
        log = train.compute_losses(student, teacher, batch, config, 0)
        assert (masks[0] is not None) == ("mim" in on) and len(teacher_calls) == (on != "ar")
        assert all(call["head"] is False and "key_mask" not in call for call in teacher_calls)
        assert {name for name in log if name.startswith("loss_")} == {f"loss_{name}" for name in on.split("+")}
        log["loss"].backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_losses_of_a_batch_by_hand():
    """compute_losses pairs views, positions and images as Eqs. 4, 6 and 7 say."""
    config = a_config(temperature=0.5)
    batch, student = train.draw_batch(config, a_cache(), 0, 0, 1), a_student(config)
    teacher = tiny_model(5, n_layer=4, dim=96, n_head=3, num_classes=4)
    log = train.compute_losses(student, teacher, batch, config, 0)
    z, h, mim = {}, {}, []
    for b in range(8):
        for m in range(2):
            tokens, c = batch.tokens[b:b + 1, m, :-1], batch.classes[b:b + 1]
            s = student.model(tokens, c, key_mask=batch.key_mask[2 * b + m][None], layers=(2, 4)).hidden
            t = teacher(tokens, c, layers=(2, 4)).hidden
            mim.append(losses.mim_loss(s[4], t[4]).item())
            for k in batch.positions.tolist():
                z[b, m, k], h[b, m, k] = student.projector(s[2][0, k]), t[2][0, k]
    K = batch.positions.tolist()
    step = np.mean([nce_by_hand(z[b, m, i], [h[other, m, j] for other in range(8)], b, 0.5)
                    for b in range(8) for m in range(2) for i in K for j in K if i != j])
    view = np.mean([nce_by_hand(z[b, i, k], [h[other, 1 - i, k] for other in range(8)], b, 0.5)
                    for b in range(8) for i in range(2) for k in K])
    for name, value in (("mim", np.mean(mim)), ("step", step), ("view", view)):
        assert abs(log[f"loss_{name}"].item() - value) < 1e-4, name
    expected = log["loss_ar"] + np.mean(mim) + 0.5 * (step + view) / 2
    assert abs(log["loss"].item() - expected) < 1e-4


def test_schedules():
    config = a_config(base_lr=1e-3, batch=512, warmup=10)
    assert abs(train.learning_rate(config, 9, 100) - 2e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * 0.09)) / 2)) < 1e-9
    assert abs(train.learning_rate(config, 0, 100) - 2e-4) < 1e-9 and train.learning_rate(config, 99, 100) < 1.1e-4
    assert train.learning_rate(a_config(schedule="constant", base_lr=1e-4, batch=256, warmup=0), 77, 100) == 1e-4
    assert train.ema_decay(a_config(ema=0.9999, ema_ramp=False), 50, 100) == 0.9999
    assert train.ema_decay(a_config(ema=0.9), 0, 100) == 0.9 and train.ema_decay(a_config(ema=0.9), 100, 100) == 1


def test_impossible_settings_get_one_sentence():
    def check(world=1, **changes):
        train.check_config(a_config(**changes), world)

    check()
    for words, changes in {
        "write ar": dict(losses="mim"), "write ar,": dict(losses="ar+moco"), "layers 1 ... 4": dict(depth=5),
        "10 crops": dict(views=11), "view loss compares at least 2": dict(views=1), "at least 2 --positions": dict(positions=1),
        "multiple of 3 process(es)": dict(world=3), "2 images": dict(batch=1), "no CUDA": dict(device="cuda"),
        "--clip positive": dict(clip=0.0), "--ema": dict(ema=1.5), "--crop-ratios": dict(crop_ratios=(0.9,)),
        "vq_ds16_c2i.pt": dict(image_size=256),
    }.items():
        if "no CUDA" in words and torch.cuda.is_available():
            continue
        refuses(ValueError, words, check, **changes)
    for changes, words in ((dict(positions=16), "K = 16"), (dict(mask_ratio=1.0), "mask ratio")):
        refuses(ValueError, words, train.draw_batch, a_config(**changes), a_cache(), 0, 0, 1)


def test_flags_come_from_the_config():
    config, given, resume = train.parse_arguments("--preset nano --lr-typo 1".split()[:2] + ["--no-ema-ramp", "--resume"])
    assert config.model == "nano" and config.ema_ramp is False and resume and given == {"ema_ramp": False}
    assert train.parse_arguments(["--preset", "B", "--losses", "ar"])[0].name == "B-ar"
    assert train.parse_arguments(["--preset", "B"])[0].crop_ratios == (1.1, 1.05)
    for name in train.PRESETS:
        config, *_ = train.parse_arguments(["--preset", name, "--data", "images", "--tokenizer", "vq.pt"])
        train.check_config(config, 1)


def test_two_processes_equal_one():
    """Losses to 1e-5; gradients of model and projector, read off AdamW's first moment after one step, to 1e-5 of
    their norm. The first moment is 0.1 times the clipped gradient."""
    runs = [run_train("dp1", "--steps", 1), run_train("dp2", "--steps", 1, processes=2)]
    assert all(run.returncode == 0 for run in runs), runs[-1].stderr[-3000:]
    one, two = metrics("dp1")[0], metrics("dp2")[0]
    for name in ("loss", "loss_ar", "loss_mim", "loss_step", "loss_view", "acc_step", "acc_view", "acc_label",
                 "negatives", "grad_norm", "val_nll"):
        assert abs(one[name] - two[name]) < 1e-5 * max(1, abs(one[name])), (name, one[name], two[name])
    assert one["negatives"] == 7
    a, b = (checkpoint(name)["optimizer"]["state"] for name in ("dp1", "dp2"))
    names = len(checkpoint("dp1")["model"]) + len(checkpoint("dp1")["projector"])
    assert len(a) == len(b) == names  # every parameter has been stepped, the projector's too
    for i in a:
        difference = (a[i]["exp_avg"] - b[i]["exp_avg"]).norm()
        assert difference <= 1e-5 * a[i]["exp_avg"].norm() + 1e-9, (i, difference)


def test_accumulation_equals_one_batch():
    """Without contrast there is nothing that a micro-batch lacks."""
    runs = [run_train("acc1", "--steps", 2, "--losses", "ar+mim"),
            run_train("acc2", "--steps", 2, "--losses", "ar+mim", "--accumulate", 4)]
    assert all(run.returncode == 0 for run in runs), runs[-1].stderr[-3000:]
    for a, b in zip(metrics("acc1"), metrics("acc2")):
        assert all(abs(a[name] - b[name]) < 1e-4 for name in ("loss", "loss_ar", "loss_mim", "grad_norm"))


def wait_for_step(name, step, process):
    deadline = time.time() + 100
    while not (metrics(name) and metrics(name)[-1]["step"] >= step):
        assert process.poll() is None and time.time() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.01)


def test_killed_and_resumed_is_bit_identical():
    """kill -9 in the middle of a run with dropout, then --resume: every tensor as in the uninterrupted run."""
    settings = ["--steps", 12, "--save-every", 3, "--dropout", 0.1]
    whole = run_train("whole", *settings)
    assert whole.returncode == 0, whole.stderr[-3000:]
    process = run_train("killed", *settings, popen=True)
    wait_for_step("killed", 5, process)
    process.kill()
    process.communicate()
    assert checkpoint("killed")["step"] < 12
    resumed = run_train("killed", *settings, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    a, b = checkpoint("whole"), checkpoint("killed")
    assert all(same(a[key], b[key]) for key in ("model", "ema", "projector", "optimizer", "step"))
    assert [line["step"] for line in metrics("killed")] == list(range(1, 13))
    assert [line["loss"] for line in metrics("killed")] == [line["loss"] for line in metrics("whole")]

    for words, args in (("exists --resume", []), ("seed 0, not 1", ["--resume", "--seed", 1])):
        refused = run_train("whole", *settings, *args)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert all(word in refused.stderr for word in words.split()), refused.stderr
    nothing = run_train("never", "--resume")
    assert nothing.returncode == 1 and "nothing to resume" in nothing.stderr and "whole" in nothing.stderr


def test_ctrl_c_saves_and_says_how_to_resume():
    process = run_train("stopped", "--steps", 2000, "--save-every", 1000, popen=True)
    wait_for_step("stopped", 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err[-2000:]
    assert "--resume --name stopped" in out and checkpoint("stopped")["step"] >= 2


def test_without_network_the_shapes_stand_in():
    """The fallback is said in a banner and recorded in the name."""
    kept = tokenizer.download_tiny_imagenet
    try:
        def offline(path, timeout=15):
            raise OSError("no route to host")

        tokenizer.download_tiny_imagenet = offline
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert tokenizer.find_images("") == "shapes" and tokenizer.find_images("x.zip") == "x.zip"
        assert "SHAPES" in said.getvalue() and "no route to host" in said.getvalue()
    finally:
        tokenizer.download_tiny_imagenet = kept


# ---- sample.py ---------------------------------------------------------------------------------------------

def test_filters():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.05]]))
    kept = [sample.filter_logits(logits, k, p).isfinite()[0].tolist() for k, p in ((2, 1.0), (4, 1.0), (0, 0.65), (0, 0.7))]
    assert kept[0] == [True, True, False, False, False]
    assert kept[1] == [True] * 5  # a tie with the fourth stays
    assert kept[2] == [True, True, False, False, False]  # the one that crosses p is kept
    assert kept[3][:2] == [True, True] and kept[3][3:] == [False, False]
    assert sample.filter_logits(logits, 2, 0.5).isfinite()[0].tolist() == [True, False, False, False, False]  # 4/7 > .5


def test_generation_is_greedy_and_guided_as_defined():
    net, classes = tiny_model(), torch.tensor([0, 3, 4])
    for cfg, interval in ((1.0, -1), (3.0, -1), (3.0, 4)):
        tokens = torch.zeros(3, 0, dtype=torch.long)
        for p in range(16):
            logits = net(tokens, classes).logits[:, -1]
            if cfg > 1 and (interval < 0 or p < interval + 2):
                null = net(tokens, torch.full_like(classes, 5)).logits[:, -1]
                logits = null + (logits - null) * cfg
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        fast = sample.generate(net, classes, cfg=cfg, cfg_interval=interval, temperature=0)
        assert torch.equal(fast, tokens)
    draws = [sample.generate(net, classes, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sampling_scripts():
    run = run_train("sampled", "--steps", 1)
    assert run.returncode == 0, run.stderr[-3000:]
    _, root = workshop()
    grid = script("sample.py", "runs/sampled", "--classes", 0, 3, 3, "--cfg", 2, "--out", "grid.png")
    assert grid.returncode == 0, grid.stderr[-3000:]
    assert Image.open(root / "grid.png").width > 3 * 96 and "cfg 2.0" in grid.stdout
    settings = ["runs/sampled", "--num-images", 10, "--batch", 3, "--ema"]
    for name, processes in (("one", 1), ("two", 2)):
        done = script("sample.py", *settings, "--npz", f"{name}.npz", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = np.load(root / "one.npz"), np.load(root / "two.npz")
    assert one["arr_0"].shape == (10, 16, 16, 3) and one["arr_0"].dtype == np.uint8
    assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_1"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert json.loads(str(one["protocol"]))["weights"] == "ema"
    for words, args in (("class 4 0 ... 3", ["runs/sampled", "--classes", 4]), ("no checkpoint", ["runs/none"])):
        refused = script("sample.py", *args)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert all(word in refused.stderr for word in words.split()), refused.stderr


def test_llamagens_files():
    """Files in the published format, random weights: encode, decode and sample from them, as the command line does."""
    _, root = workshop()
    torch.manual_seed(0)
    vq = tokenizer.VQModel(tokenizer.VQConfig()).eval()
    torch.save({"model": vq.state_dict()}, root / "vq_ds16.pt")
    net = model.Transformer(model.ModelConfig(*model.SIZES["nano"], num_tokens=16))
    torch.save({"model": net.state_dict(), "steps": 1, "args": argparse.Namespace(image_size=64)}, root / "gpt.pt")
    again = tokenizer.load_tokenizer(root / "vq_ds16.pt")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(again.encode(x), vq.encode(x)) and again.encode(x).shape == (2, 4)
    assert torch.equal(again.decode(again.encode(x)), vq.decode(vq.encode(x)))
    done = script("sample.py", "--gpt", "gpt.pt", "--vq", "vq_ds16.pt", "--classes", 207, 360, "--cfg", 4.0)
    assert done.returncode == 0 and Image.open(root / "samples.png").width > 2 * 96, done.stderr[-3000:]
    for words, args in (("holds a VQ tokenizer", ["--gpt", "vq_ds16.pt", "--vq", "vq_ds16.pt"]),
                        ("holds a transformer", ["--gpt", "gpt.pt", "--vq", "gpt.pt"]),
                        ("64 codes 16384", ["--gpt", "gpt.pt", "--vq", "vq.pt"])):
        refused = script("sample.py", *args)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr[-2000:]
        assert all(word in refused.stderr for word in words.split()), refused.stderr
    (root / "vq_ds16.pt").unlink()


# ---- probe.py ----------------------------------------------------------------------------------------------


def planted(n, seed, strength=1.0, classes=4, width=12):
    """Features (n, 9, width) of noise; the label is written into the fourth one. And the labels (n,)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    x = torch.randn(n, 9, width, generator=g)
    x[:, 3, :classes] += strength * F.one_hot(labels, classes)
    return x, labels


def test_probe_finds_a_planted_label_and_nothing_else():
    (x, labels), (x2, labels2) = planted(1500, 0, strength=6.0), planted(800, 1, strength=6.0)
    results = probe.linear_probe(x, labels, torch.arange(1500), x2, labels2, 4)
    assert results.pop(3)["accuracy"] > 0.97
    chance = [low <= 0.25 <= high for low, high in (result["interval"] for result in results)]
    assert sum(chance) >= 7, results  # of eight 95 % intervals one may miss
    assert all(abs(result["accuracy"] - 0.25) < 3.5 * math.sqrt(0.25 * 0.75 / 800) for result in results)


def test_probe_agrees_with_plain_sgd_for_90_epochs():
    (x, labels), (x2, labels2) = planted(1500, 2, strength=2.0), planted(4000, 3, strength=2.0)
    quick = probe.linear_probe(x, labels, torch.arange(1500), x2, labels2, 4)[3]
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.BatchNorm1d(12, affine=False), torch.nn.Linear(12, 4))
    optimizer = torch.optim.SGD(plain.parameters(), quick["learning_rate"], 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    for _ in range(90):
        for rows in torch.randperm(1500).split(256):
            loss = F.cross_entropy(plain(x[rows, 3]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    accuracy = (plain.eval()(x2[:, 3]).argmax(1) == labels2).float().mean().item()
    assert 0.5 < accuracy < 0.95 and abs(quick["accuracy"] - accuracy) < 0.01, (quick, accuracy)


def test_probe_reports_the_leak_of_a_true_class():
    """Under the null class random codes say nothing about the label; under the true class the features give it away."""
    net, g = tiny_model(), torch.Generator().manual_seed(0)
    codes, labels = torch.randint(11, (900, 16), generator=g).numpy(), torch.randint(5, (900,), generator=g)
    accuracy = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for classes in (torch.full((900,), 5), labels):
            x = probe.extract(net, codes, classes, [2], Path(folder)).float()[:, :1]  # step 2
            result, = probe.linear_probe(x[:600], labels[:600], torch.arange(600), x[600:], labels[600:], 5)
            accuracy.append((result["accuracy"], *result["interval"]))
    (_, low, high), leak = accuracy
    assert low <= 0.2 <= high and leak[0] > 0.9, accuracy


def test_extracted_features_are_the_models():
    net, (codes, _) = tiny_model(), some_tokens(count=16)
    with tempfile.TemporaryDirectory() as folder:
        x = probe.extract(net, codes.numpy(), torch.full((3,), 5), [1, 3], Path(folder), batch=2)
    hidden = net(codes[:, :-1], torch.full((3,), 5), layers=(1, 3)).hidden
    assert x.shape == (3, 18, 32) and probe.eight_steps(16) == [2, 4, 6, 8, 10, 12, 14, 16]
    for i, n in enumerate((1, 3)):
        assert torch.allclose(x[:, 9 * i:9 * i + 8].float(), hidden[n][:, 1::2], atol=2e-2)
        assert torch.allclose(x[:, 9 * i + 8].float(), hidden[n].mean(1), atol=2e-2)


def test_attention_numbers():
    """Attention to the own token only, to the left one only, and spread evenly over what can be seen."""
    T = 17  # a 4 x 4 grid behind the class, the last query included
    own, left = torch.eye(T)[None], torch.zeros(1, T, T)
    left[0, 1:, :-1] = torch.eye(T - 1)
    numbers = probe.attention_numbers(own, 4)
    assert numbers["itself"] == [1.0] and numbers["class"] == [0.0] and numbers["distance"] == [0.0]
    numbers = probe.attention_numbers(left, 4)  # the first query sees the class, three sit at a row's beginning
    assert np.allclose([numbers[kind][0] for kind in ("class", "neighbours", "elsewhere")], [1 / 16, 12 / 16, 3 / 16])
    assert abs(numbers["distance"][0] - (12 + 3 * math.sqrt(10)) / 15) < 1e-5
    net, (tokens, _) = tiny_model(), some_tokens(count=16)
    weights = next(probe.attention(net, tokens.numpy()))[0]
    numbers = probe.attention_numbers(weights, 4)
    assert np.allclose(sum(np.array(numbers[kind]) for kind in probe.MASSES), 1, atol=1e-5)


def test_probe_script():
    for name, size in (("probed", 16), ("other-size", 32)):
        run = run_train(name, "--steps", 1, "--image-size", size)
        assert run.returncode == 0, run.stderr[-3000:]
    _, root = workshop()
    done = script("probe.py", "runs/probed", "--out", "figures", "--layers", "all", "--images", 4, "--map-images", 0, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((root / "figures" / "probe.json").read_text())["runs"]["probed"]
    assert len(results["probe"]) == 4 * 9 and len(results["attention"]["distance"]) == 4
    assert {"probe.png", "layers.png", "attention.png", "mass.png", "distance.png", "cosine.png", "codes.png"} <= \
        {path.name for path in (root / "figures").iterdir()}
    for words, args in (("16 tokens 64 apart", ["runs/probed", "runs/other-size"]), ("no checkpoint", ["runs/none"]),
                        ("same name", ["runs/probed", "runs/probed"]), ("layers 1 ... 4", ["runs/probed", "--layers", 9])):
        refused = script("probe.py", *args)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr[-2000:]
        assert all(word in refused.stderr for word in words.split()), refused.stderr


# ---- fid.py ------------------------------------------------------------------------------------------------

def _raises(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as caught:
        assert "\n" not in str(caught)
        return str(caught)
    raise AssertionError(f"{call.__name__} did not refuse")


def _statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def test_fid_frechet_closed_forms():
    """Known Gaussians, scipy's matrix square root, a set with itself, rank-deficient covariances."""
    rng = np.random.default_rng(0)
    a, b, m = rng.uniform(0.1, 2, 40), rng.uniform(0.1, 2, 40), rng.standard_normal(40)
    Q = np.linalg.qr(rng.standard_normal((40, 40)))[0]  # shared axes: the covariances commute
    closed = m @ m + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    got = fid.frechet_distance(np.zeros(40), Q * a @ Q.T, m, Q * b @ Q.T)
    assert abs(got - closed) < 1e-6, (got, closed)
    for n in (30, 41, 400):  # fewer samples than features, as many, more
        x, y = rng.standard_normal((n, 40)) * a, rng.standard_normal((n + 5, 40)) @ Q * b + 0.3
        (mu1, s1), (mu2, s2) = _statistics(x), _statistics(y)
        ridge = 1e-12 * np.eye(40)
        root = scipy.linalg.sqrtm((s1 + ridge) @ (s2 + ridge)).real
        oracle = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root)
        got = fid.frechet_distance(mu1, s1, mu2, s2)
        assert abs(got - oracle) < 1e-4 * oracle, (n, got, oracle)
        assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-6
        assert abs(fid.frechet_distance(mu2, s2, mu1, s1) - got) < 1e-8
    _raises(ValueError, fid.frechet_distance, mu1, s1, mu2[1:], s2[1:, 1:])
    _raises(ValueError, fid.frechet_distance, mu1, s1 - 9 * np.eye(40), mu2, s2)


def test_fid_moments_and_inception_score():
    """Streamed moments equal numpy's far from zero; IS by hand, 0 log 0 = 0, a shorter last split."""
    x = 1000 + np.random.default_rng(1).standard_normal((101, 7))
    for batch in (1, 10, 101):
        moments = fid.Moments()
        for part in torch.from_numpy(x).split(batch):
            moments.add(part)
        for got, oracle in zip(moments.result(), _statistics(x)):
            assert np.allclose(got, oracle, rtol=1e-9, atol=1e-9)
    assert abs(fid.inception_score(np.eye(4)) - 4) < 1e-12  # certain and diverse: the number of classes
    assert abs(fid.inception_score(np.full((6, 4), 0.25)) - 1) < 1e-12
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    kl = sum(p[i, j] * np.log(p[i, j] / p[:, j].mean()) for i in range(2) for j in range(2)) / 2
    assert abs(fid.inception_score(p) - np.exp(kl)) < 1e-12
    assert abs(fid.inception_score(np.concatenate([np.eye(4), np.eye(4)[:2]]), split=4) - (4 + 2) / 2) < 1e-12


def test_fid_precision_recall_brute_force():
    """Against loops over all pairs, in blocks of every size; copies, ties and disjoint sets."""
    rng = np.random.default_rng(2)

    def brute(real, fake, k):
        def radius(x, i):
            return sorted(np.square(x[i] - y).sum() for j, y in enumerate(x) if j != i)[k - 1]
        precision = [any(np.square(f - r).sum() <= radius(real, i) for i, r in enumerate(real)) for f in fake]
        recall = [any(np.square(f - r).sum() <= radius(fake, i) for i, f in enumerate(fake)) for r in real]
        return np.mean(precision), np.mean(recall)

    for real, fake in ((rng.standard_normal((30, 3)), rng.standard_normal((21, 3)) * 0.6 + 0.4),
                       (rng.integers(0, 4, (25, 2)), rng.integers(0, 5, (30, 2)))):  # integers: many ties
        for k, block in ((3, 500), (3, 4), (1, 7), (5, 30)):
            assert np.allclose(fid.precision_recall(real, fake, k, block), brute(real, fake, k)), (k, block)
    x = rng.standard_normal((20, 600)).astype(np.float32).repeat(5, 0)  # each image five times: radii of zero
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    _raises(ValueError, fid.precision_recall, x[:3], x)


def test_fid_resize_adm():
    """TensorFlow 1's bilinear, written as loops over its definition, up and down; exact in float32."""
    f = np.float32
    for H, W, size in ((5, 4, 9), (12, 17, 9), (9, 9, 9)):
        x = np.random.default_rng(H).integers(0, 256, (H, W)).astype(f)
        out = np.zeros((size, size), f)
        for i, j in np.ndindex(size, size):
            y, u = f(i) * (f(H) / f(size)), f(j) * (f(W) / f(size))
            top, left = int(y), int(u)
            low, right = min(top + 1, H - 1), min(left + 1, W - 1)
            upper = x[top, left] + (x[top, right] - x[top, left]) * (u - f(left))
            lower = x[low, left] + (x[low, right] - x[low, left]) * (u - f(left))
            out[i, j] = upper + (lower - upper) * (y - f(top))
        got = fid.resize_adm(torch.from_numpy(x).expand(2, 3, H, W), size)
        assert got.shape == (2, 3, size, size) and (got[1, 2].numpy() == out).all()


def _random_inception(path, counters=True):
    torch.manual_seed(0)
    state = {name: value for name, value in fid.InceptionV3().state_dict().items()
             if counters or not name.endswith("num_batches_tracked")}
    torch.save(state, path)
    return state


def test_fid_inception_weights():
    """The published layout is loaded strictly, with and without counters; wrong and truncated files are named."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        state = _random_inception(path, counters=False)
        assert len(state) == 472 and len(fid.InceptionV3().state_dict()) == 566
        layout = tokenizer.digest([[name, list(v.shape)] for name, v in sorted(fid.InceptionV3().state_dict().items())])
        assert layout == "98efe1f44183bf67"  # names and shapes of pytorch-fid's fid_inception_v3()
        model, line = fid.load_inception(path, folder, "adm", "cpu")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items()) 
        pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        extract = fid.inception_extractor(model)
        f, alone = extract(pixels), extract(pixels[:1])
        assert f.pool.shape == (3, 2048) and f.spatial.shape == (3, 2023) and f.probabilities.shape == (3, 1008)
        assert torch.allclose(f.pool[:1], alone.pool, rtol=1e-4, atol=1e-6)  # an image does not see its neighbours
        model.fc.bias.copy_(torch.randn(1008))
        assert torch.equal(extract(pixels).probabilities, f.probabilities)  # guards IS against the bias
        whole = path.read_bytes()
        path.write_bytes(whole[:1000])
        _raises(ValueError, fid.load_inception, path, folder, "adm", "cpu")
        torch.save({name: value for name, value in state.items() if name != "fc.weight"}, path)
        _raises(ValueError, fid.load_inception, path, folder, "adm", "cpu")
        torch.save(state | {"fc.weight": state["fc.weight"][:1000]}, path)
        _raises(ValueError, fid.load_inception, path, folder, "adm", "cpu")


def _extract_means(pixels):
    """A cheap extractor: 6 features, probabilities of 3 classes."""
    x = torch.from_numpy(pixels).double()
    pool = torch.cat([x.mean((1, 2)), x.std((1, 2))], 1)
    return fid.Features(pool.float(), pool[:, :2].float(), x.mean((1, 2)).softmax(1))


def test_fid_sides_and_statistics():
    """npz and flat folder give the same pixels; no number depends on the batch; statistics are reusable."""
    pixels = np.random.default_rng(3).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        flat, npz = Path(folder, "flat"), f"{folder}/images.npz"
        flat.mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(flat / f"{i:02d}.png")
        np.savez(npz, arr_0=pixels, arr_1=np.arange(11) % 3, protocol=json.dumps({"cfg": 1.5, "weights": "ema"}))
        sides = [fid.npz_side(npz), fid.image_side(fid.all_images(flat))]
        for side in sides:
            assert side.count == 11 and side.size == (8, 8)
            assert all((np.concatenate(list(side.batches(batch))) == pixels).all() for batch in (1, 4, 50))
        assert sides[0].protocol["cfg"] == 1.5 and sides[1].labels is None
        a, b = (fid.feature_statistics(sides[0], _extract_means, batch) for batch in (1, 5))
        for name in ("mu", "sigma", "mu_s", "sigma_s"):
            assert np.allclose(a.moments[name], b.moments[name], rtol=1e-6)
        assert abs(a.score / b.score - 1) < 1e-6 and a.agreement == b.agreement
        row = fid.compare(a, b)
        assert max(abs(row["FID"]), abs(row["sFID"])) < 1e-6 and row["precision"] == row["recall"] == 1
        assert len(fid.feature_statistics(sides[0], _extract_means, 4, keep=5).features) == 5
        np.savez(npz, **a.moments)  # statistics alone
        again = fid.feature_statistics(fid.npz_side(npz), _extract_means)
        row = fid.compare(again, b)
        assert abs(row["FID"]) < 1e-6 and row["precision"] is None
        _raises(ValueError, fid.check_statistics, fid.npz_side(npz), "features: InceptionV3, resize pytorch-fid")
        lines = fid.protocol_lines(sides[0], sides[:1], "features: x") + fid.warning_lines(sides[0], sides[:1], 2048)
        told = "\n".join(lines)
        for word in ("cfg 1.5", "weights ema", sides[0].fingerprint, "11 images", "rank-deficient", "50,000"):
            assert word in told, word


def test_fid_bad_input():
    """Each mistake ends in one sentence (a ValueError or OSError whose text says what)."""
    with tempfile.TemporaryDirectory() as folder:
        def npz(**arrays):
            np.savez(f"{folder}/x.npz", **arrays)
            return f"{folder}/x.npz"

        good = np.zeros((4, 8, 8, 3), np.uint8)
        for arrays in (dict(images=good), dict(arr_0=good.astype(np.float32)), dict(arr_0=good[:1]),
                       dict(arr_0=good[..., :1]), dict(arr_0=good, arr_1=np.zeros(3)), dict(mu=np.zeros(3)),
                       dict(arr_0=good, protocol="not json")):
            _raises(ValueError, fid.npz_side, npz(**arrays))
        path = Path(npz(arr_0=good))
        path.write_bytes(path.read_bytes()[:300])
        _raises(ValueError, fid.npz_side, path)
        _raises(FileNotFoundError, fid.npz_side, f"{folder}/none.npz")
        _raises(FileNotFoundError, fid.all_images, f"{folder}/none")
        _raises(ValueError, fid.load_classifier, npz(arr_0=good), 8, 1, folder)
        mixed = Path(folder, "mixed")
        mixed.mkdir()
        for i, side in enumerate((8, 8, 9)):
            Image.new("RGB", (side, side)).save(mixed / f"{i}.png")
        _raises(ValueError, lambda: list(fid.image_side(fid.all_images(mixed)).batches(2)))
        _raises(ValueError, fid.open_sides, npz(arr_0=good), [str(mixed), "held-out"], "train", None)
        np.savez(f"{folder}/y.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
        _raises(ValueError, fid.open_sides, npz(arr_0=good), [f"{folder}/y.npz"], "train", None)


def test_fid_classifier():
    """Trained twice it is the same; it learns; it is found again in the cache; the global RNG is untouched."""
    rng = np.random.default_rng(4)
    with tempfile.TemporaryDirectory() as folder:
        for c, colour in enumerate(("red", "green", "blue")):
            Path(folder, "real", colour).mkdir(parents=True)
            for i in range(30):  # noise with a tint
                tint = rng.integers(0, 160, (16, 16, 3)) + 60 * (np.arange(3) == c)
                Image.fromarray(tint.astype(np.uint8)).save(Path(folder, "real", colour, f"{i}.png"))
        real, cache = f"{folder}/real", f"{folder}/cache"
        before = torch.get_rng_state()
        a, b = (fid.train_classifier(tokenizer.open_images(real), 16, 2, batch=8) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        assert torch.equal(before, torch.get_rng_state())
        model, line = fid.load_classifier(real, 16, 30, cache)
        again, same = fid.load_classifier(real, 16, 30, cache)
        assert line == same and "held-out" in line and len(list(Path(cache).iterdir())) == 1
        assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))
        extract = fid.classifier_extractor(again)
        got = fid.feature_statistics(fid.image_side(tokenizer.open_images(real, "val"), 16), extract, 5)
        assert got.agreement > 0.6 and f"{got.agreement:.1%}" in line and got.moments["sigma"].shape == (256, 256)
        row = fid.compare(got, got, "-c")
        assert set(row) == {"FD-c", "precision-c", "recall-c", "class agreement"} and abs(row["FD-c"]) < 1e-6
        next(Path(cache).iterdir()).write_bytes(b"cut")
        _raises(ValueError, fid.load_classifier, real, 16, 30, cache)


# ---- README.md and coursework ------------------------------------------------------------------------------

DOCUMENTS = {path: path.read_text() for path in (HERE / "README.md", HERE / "coursework" / "README.md")}


def test_documents_name_what_exists():
    """Every `file.function` that they name, the equation map's included, and every file that they link to."""
    scripts = {"fid": fid, "losses": losses, "model": model, "probe": probe, "sample": sample,
               "tokenizer": tokenizer, "train": train}
    named = r"`({})\.(?!py|pt|json)([\w.]+)".format("|".join(scripts))
    for path, text in DOCUMENTS.items():
        for script, name in re.findall(named, text):
            found = scripts[script]
            for part in name.rstrip(".").split("."):
                assert hasattr(found, part), f"{path}: {script}.{name} does not exist"
                found = getattr(found, part)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path}: no {link}"
    assert all(f"| Eq. {n} |" in DOCUMENTS[HERE / "README.md"] for n in range(2, 9))


def test_exercises_fit_the_code():
    """Every line that an exercise takes out stands in the file that the exercise names."""
    code = "".join(path.read_text() for path in HERE.glob("*.py") if path.name != "test_all.py").splitlines()
    diffs = re.findall(r"```diff\n(.*?)```", DOCUMENTS[HERE / "coursework" / "README.md"], re.S)
    removed = [line[1:] for diff in diffs for line in diff.splitlines() if line.startswith("-")]
    assert len(diffs) >= 8 and len(removed) >= 10
    assert not (missing := [line for line in removed if line not in code]), missing


# ---- The runner --------------------------------------------------------------------------------------------

def main():
    words, failed = sys.argv[1:], 0
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    tests = {name: test for name, test in tests.items() if not words or any(word in name for word in words)}
    for name, test in tests.items():
        start = time.time()
        try:
            test()
            print(f"ok     {time.time() - start:5.1f} s  {name[5:].replace('_', ' ')}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {time.time() - start:5.1f} s  {name[5:].replace('_', ' ')}\n{traceback.format_exc()}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
