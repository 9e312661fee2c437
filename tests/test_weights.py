"""Weights: where they are looked for, what may differ from the model, and that everything else is refused."""

import builtins
import errno
import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import FIRST_CONV, Server, StateDict, assert_holds, flip, page, random_weights, saved, tiny

import convmlp
from convmlp.common.errors import CheckpointError
from convmlp.variations import PURE_MLPS, build
from convmlp.weights import (
    adapt_state_dict,
    expected_hash,
    extract_state_dict,
    fitting_variant,
    load_pretrained,
    read_checkpoint,
)
from convmlp.zoo import VARIANTS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return tmp_path / "torch_home" / "hub" / "checkpoints"


@pytest.fixture
def weights() -> StateDict:
    return random_weights(tiny())


@pytest.fixture
def file(tmp_path, weights) -> Path:
    return saved(weights, tmp_path / "tiny.pth")


# Sources


def test_file_urls_of_equal_names_are_different_files(tmp_path):
    for seed in (1, 2):
        weights = random_weights(tiny(), seed)
        (tmp_path / f"run {seed}").mkdir()
        file = saved(weights, tmp_path / f"run {seed}" / "last.pth")
        model = tiny()
        load_pretrained(model, file.as_uri())
        assert_holds(model, weights)


# Downloads


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        yield server


BROKEN = {
    "not found": lambda body: lambda handler: handler.send_error(404),
    "server error": lambda body: lambda handler: handler.send_error(503),
    "login page": lambda body: page(b"<!DOCTYPE html><html><body>Please log in</body></html>"),
    "empty": lambda body: page(b""),
    "half": lambda body: page(body[: len(body) // 2]),
    "broken off": lambda body: page(body, len(body) // 2),
    "broken off, chunked": lambda body: page(body, len(body) // 2, chunked=True),
    "bit flip": lambda body: page(flip(body, body.index(b"head.weight") + 6)),
    "no HTTP": lambda body: lambda handler: handler.wfile.write(b"220 smtp.example.org ESMTP\r\n"),
    "hangs up": lambda body: lambda handler: None,
}


def test_a_url_is_downloaded_once_without_a_word_and_kept_in_the_cache(server, cache, file, weights, capfd):
    server.pages["/some/tiny.pth?download=1"] = page(file.read_bytes())
    for _ in range(2):
        model = tiny()
        load_pretrained(model, f"{server.url}/some/tiny.pth?download=1")
        assert_holds(model, weights)
    assert server.asked == ["/some/tiny.pth?download=1"]
    assert [f.read_bytes() for f in cache.glob("tiny-*.pth")] == [file.read_bytes()]
    assert capfd.readouterr() == ("", "")


def test_urls_of_equal_names_are_different_files(server, cache, tmp_path):
    for seed in (1, 2):
        weights = random_weights(tiny(), seed)
        server.pages[f"/run{seed}/last.pth"] = page(saved(weights, tmp_path / f"{seed}.pth").read_bytes())
        model = tiny()
        load_pretrained(model, f"{server.url}/run{seed}/last.pth")
        assert_holds(model, weights)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_next_mirror_is_tried(broken, server, cache, file, weights):
    good = file.read_bytes()
    server.pages = {"/first/tiny.pth": BROKEN[broken](good), "/second/tiny.pth": page(good)}
    model = tiny()
    load_pretrained(model, [f"{server.url}/first/tiny.pth", f"{server.url}/second/tiny.pth"])
    assert_holds(model, weights)
    assert server.asked == ["/first/tiny.pth", "/second/tiny.pth"]
    assert [(f.name, f.read_bytes()) for f in cache.iterdir()] == [("tiny.pth", good)]


def test_a_mirror_that_cannot_be_reached_is_passed_over(server, cache, file, weights):
    server.pages = {"/tiny.pth": page(file.read_bytes())}
    gone = Server()
    gone.close()
    model = tiny()
    load_pretrained(model, [f"{gone.url}/tiny.pth", f"{server.url}/tiny.pth"])
    assert_holds(model, weights)


@pytest.mark.parametrize("broken", BROKEN)
def test_failed_downloads_leave_nothing_behind_and_say_what_to_do(broken, server, cache, file):
    answer = BROKEN[broken](file.read_bytes())
    urls = [f"{server.url}/first/tiny.pth", f"{server.url}/second/tiny.pth"]
    server.pages = {f"/{name}/tiny.pth": answer for name in ("first", "second")}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(tiny(), urls)
    assert list(cache.iterdir()) == []
    assert all(f"  {url}: " in str(error.value) for url in urls)
    assert str(cache / "tiny.pth") in str(error.value)
    assert ".part" not in str(error.value)


def unannounced(body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Send a body without a word of its length."""

    def answer(handler: BaseHTTPRequestHandler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize("send", [page, unannounced])
def test_a_download_beyond_the_limit_is_cut_off(send, server, cache, file, monkeypatch):
    body = file.read_bytes()
    limit = len(body) - 1
    server.pages["/tiny.pth"] = send(body)
    monkeypatch.setattr("convmlp.weights.LARGEST_DOWNLOAD", limit)
    said = (
        f"announces {len(body)} bytes, the limit for downloads is {limit}" if send is page else f"more than {limit} b"
    )
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(tiny(), f"{server.url}/tiny.pth")
    assert list(cache.iterdir()) == []


def test_a_download_of_unknown_length_is_taken(server, file, weights):
    server.pages["/tiny.pth"] = unannounced(file.read_bytes())
    model = tiny()
    load_pretrained(model, f"{server.url}/tiny.pth")
    assert_holds(model, weights)


def test_a_download_at_the_limit_is_taken(server, file, weights, monkeypatch):
    server.pages["/tiny.pth"] = page(file.read_bytes())
    monkeypatch.setattr("convmlp.weights.LARGEST_DOWNLOAD", file.stat().st_size)
    model = tiny()
    load_pretrained(model, f"{server.url}/tiny.pth")
    assert_holds(model, weights)


def test_an_announced_size_beyond_the_limit_is_not_begun(server, cache):
    def answer(handler: BaseHTTPRequestHandler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(2**50))
        handler.end_headers()
        handler.wfile.write(b"x")

    server.pages["/huge.pth"] = answer
    with pytest.raises(CheckpointError, match=f"announces {2**50} bytes, the limit for downloads is {4 * 2**30}"):
        load_pretrained(tiny(), f"{server.url}/huge.pth")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("sent", [None, 100], ids=["before the answer", "in the middle"])
def test_a_server_that_falls_silent_is_left_for_the_next(sent, server, cache, file, weights, monkeypatch):
    silence = threading.Event()
    body = file.read_bytes()

    def answer(handler: BaseHTTPRequestHandler):
        if sent:
            page(body, sent)(handler)
            handler.wfile.flush()
        silence.wait(20)

    server.pages = {"/first/tiny.pth": answer, "/second/tiny.pth": page(body)}
    monkeypatch.setattr("convmlp.weights.TIMEOUT", 0.3)
    model = tiny()
    start = time.monotonic()
    try:
        load_pretrained(model, [f"{server.url}/first/tiny.pth", f"{server.url}/second/tiny.pth"])
    finally:
        silence.set()
    assert time.monotonic() - start < 10
    assert_holds(model, weights)
    assert [f.name for f in cache.iterdir()] == ["tiny.pth"]


def test_a_broken_connection_is_named(server, file):
    body = file.read_bytes()
    server.pages["/tiny.pth"] = page(body, 100)
    with pytest.raises(CheckpointError, match=f"the connection broke off after 100 of {len(body)} bytes"):
        load_pretrained(tiny(), f"{server.url}/tiny.pth")


HASHED = {
    "fragment": "/tiny.pth#sha256={}",
    "fragment, first digits": "/tiny.pth#sha256={:.8}",
    "fragment, capitals": "/tiny.pth#sha256={}",
    "name": "/tiny-{:.8}.pth",
    "name, all digits": "/tiny-{}.pth",
    "file URL": "file://#sha256={}",
}


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("kind", HASHED)
def test_the_hash_of_a_url_is_checked(kind, wrong, server, cache, file, weights):
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = "".join("0123456789abcdef"[15 - int(digit, 16)] for digit in found) if wrong else found
    expected = f"abcdefab{expected[8:]}" if wrong else expected  # whose first digits are no date
    template = HASHED[kind]
    url = template.format(expected.upper() if "capitals" in kind else expected)
    if kind == "file URL":
        url = url.replace("file://", file.as_uri())
    else:
        url = server.url + url
        server.pages[url.removeprefix(server.url).partition("#")[0]] = page(file.read_bytes())
    model = tiny()
    if not wrong:
        load_pretrained(model, url)
        return assert_holds(model, weights)
    with pytest.raises(CheckpointError, match=f"wrong SHA-256: expected abcdefab[0-9a-f]*, found {found}"):
        load_pretrained(model, url)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_of_mirrors_the_one_with_the_right_hash_is_taken(server, file, weights):
    name = f"tiny-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.pth"
    other = saved_bytes(random_weights(tiny(), seed=2))
    server.pages = {f"/first/{name}": page(other), f"/second/{name}": page(file.read_bytes())}
    model = tiny()
    load_pretrained(model, [f"{server.url}/first/{name}", f"{server.url}/second/{name}"])
    assert_holds(model, weights)


def saved_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.org/resnet18-5c106cde.pth", "5c106cde"),
        ("https://a.org/retinanet_20200130-c2398f9e.pth", "c2398f9e"),
        ("https://a.org/model-20240115.pth", ""),
        ("https://a.org/model-base.pth", ""),
        ("https://a.org/abcdef01-model.pth", ""),
        ("https://a.org/model-5c106cde.pth#sha256=ABCDEF0123", "abcdef0123"),
        ("https://a.org/model-5c106cde.pth?x=1", "5c106cde"),
    ],
)
def test_the_hash_in_a_url(url, expected):
    assert expected_hash(url) == expected


@pytest.mark.parametrize("fragment", ["sha256=", "sha256=xyz", "sha256=abc", "sha512=" + "a" * 64, "main"])
def test_a_fragment_that_is_not_a_hash_is_named(fragment, server, file):
    server.pages["/tiny.pth"] = page(file.read_bytes())
    with pytest.raises(CheckpointError, match=f"#{fragment} is not #sha256=HEX"):
        load_pretrained(tiny(), f"{server.url}/tiny.pth#{fragment}")
    assert server.asked == []


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(server, cache, file, weights):
    body = file.read_bytes()
    arrived, silence = threading.Event(), threading.Event()

    def answer(handler: BaseHTTPRequestHandler):
        page(body, len(body) - 1)(handler)
        handler.wfile.flush()
        arrived.set()
        silence.wait(60)

    url = f"{server.url}/tiny.pth"
    server.pages["/tiny.pth"] = answer
    code = f"from convmlp.weights import find_checkpoint; find_checkpoint({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert arrived.wait(60)
        while not (cache.exists() and list(cache.iterdir())):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        silence.set()
    (left,) = cache.iterdir()
    assert left.suffix == ".part"
    server.pages["/tiny.pth"] = page(body)
    model = tiny()
    load_pretrained(model, url)
    assert_holds(model, weights)


def test_long_names_in_urls_are_shortened(server, file, weights):
    name = "x" * 300 + "." + "y" * 300
    server.pages[f"/{name}"] = page(file.read_bytes())
    model = tiny()
    load_pretrained(model, f"{server.url}/{name}")
    assert_holds(model, weights)


def test_a_progress_bar_is_shown_on_request(server, file, capsys):
    server.pages["/tiny.pth"] = page(file.read_bytes())
    load_pretrained(tiny(), f"{server.url}/tiny.pth", progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(server, cache, file, monkeypatch):
    server.pages["/tiny.pth"] = page(file.read_bytes())

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system") as error:
        load_pretrained(tiny(), f"{server.url}/tiny.pth")
    assert str(cache) in str(error.value)


# What may differ


@torch.no_grad()
def test_another_number_of_classes_starts_from_a_fresh_head(file, weights, caplog):
    model = tiny(num_classes=70)
    with caplog.at_level(logging.WARNING):
        load_pretrained(model, file)
    assert_holds(model, weights, but=("head.",))
    assert model.head.weight.shape == (70, 24)
    assert 0.015 < model.head.weight.std() < 0.025
    assert model.head.bias.count_nonzero() == 0
    (record,) = caplog.records
    assert str(file) in record.message
    assert "5 classes" in record.message
    assert "70" in record.message


def test_equal_classes_load_without_a_word(file, weights, caplog):
    model = tiny()
    load_pretrained(model, file)
    assert_holds(model, weights)
    assert caplog.records == []


@pytest.mark.parametrize("kwargs", [dict(classifier_head=False), dict(num_classes=0)], ids=str)
def test_a_model_without_head_leaves_head_and_norm_of_the_file_aside(kwargs, file, weights):
    model = tiny(**kwargs)
    load_pretrained(model, file)
    assert_holds(model, weights)
    assert not [name for name in model.state_dict() if name.startswith(("norm.", "head."))]


def test_a_model_with_the_final_norm_alone_takes_it(file, weights):
    model = tiny(num_classes=0, final_norm=True)
    load_pretrained(model, file)
    assert_holds(model, weights)
    assert model.norm.weight.equal(weights["norm.weight"])


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [1, 6])
def test_the_answer_to_a_grey_image_survives_other_input_channels(in_chans, file, weights):
    colour, other = tiny(), tiny(in_chans=in_chans)
    load_pretrained(colour, file)
    load_pretrained(other, file)
    assert_holds(other, weights, but=(FIRST_CONV,))
    grey = torch.randn(2, 1, 40, 48)
    expected = colour(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(other(grey.expand(-1, in_chans, -1, -1)), expected, rtol=1e-4)
    assert not torch.allclose(colour(torch.randn(2, 3, 40, 48)), expected, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("in_chans", "repeated"), [(2, [0, 1]), (4, [0, 1, 2, 0]), (5, [0, 1, 2, 0, 1])])
def test_input_channels_beyond_colour_repeat_its_kernels_rescaled(in_chans, repeated, file, weights):
    model = tiny(in_chans=in_chans)
    load_pretrained(model, file)
    assert torch.allclose(model.state_dict()[FIRST_CONV], weights[FIRST_CONV][:, repeated] * 3 / in_chans)
    assert_holds(model, weights, but=(FIRST_CONV,))


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [2, 4, 5])
def test_kernels_alike_in_all_channels_keep_their_answer_to_a_grey_image(in_chans, tmp_path, weights):
    weights[FIRST_CONV] = weights[FIRST_CONV][:, :1].repeat(1, 3, 1, 1)
    file = saved(weights, tmp_path / "grey.pth")
    colour, other = tiny(), tiny(in_chans=in_chans)
    load_pretrained(colour, file)
    load_pretrained(other, file)
    grey = torch.randn(2, 1, 40, 48)
    expected = colour(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(other(grey.expand(-1, in_chans, -1, -1)), expected, rtol=1e-4)


@torch.no_grad()
def test_a_greyscale_file_serves_a_colour_model(tmp_path):
    grey_model = tiny(in_chans=1)
    weights = random_weights(grey_model)
    grey_model.load_state_dict(weights)
    colour = tiny()
    load_pretrained(colour, saved(weights, tmp_path / "grey.pth"))
    grey = torch.randn(2, 1, 40, 48)
    assert torch.allclose(colour(grey.expand(-1, 3, -1, -1)), grey_model(grey), rtol=1e-4)


def test_a_file_of_half_precision_leaves_the_model_in_its_own(tmp_path, weights):
    model = tiny()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    load_pretrained(model, saved(half, tmp_path / "half.pth"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_holds(model, {name: value.to(weights[name].dtype) for name, value in half.items()})


def test_a_model_on_the_meta_device_takes_the_tensors_of_the_file(file, weights):
    with torch.device("meta"):
        model = tiny()
    load_pretrained(model, file)
    assert_holds(model, weights)


def test_a_model_on_the_meta_device_gets_a_real_head_where_the_file_has_other_classes(file):
    with torch.device("meta"):
        model = tiny(num_classes=70)
    load_pretrained(model, file)
    assert not any(p.is_meta for p in model.parameters())
    assert model.head.weight.shape == (70, 24) and 0.01 < model.head.weight.std() < 0.03


# Formats


def prefixed(prefix: str) -> Callable[[StateDict, StateDict], dict]:
    return lambda w, other: {"state_dict": {prefix + name: value for name, value in w.items()}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w, other: {"epoch": 3, "state_dict": w, "class_names": ["a", "b"], "arch": "convmlp_s"},
        lambda w, other: {"state_dict": other, "state_dict_ema": w},
        lambda w, other: {"state_dict": w, "state_dict_ema": None},
        lambda w, other: {"model": w, "optimizer": {"state": {0: {"step": 1}}}},
        lambda w, other: {"module." + name: value for name, value in w.items()},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
    ],
    ids=[
        "state_dict", "state_dict_ema", "no EMA", "model",
        "bare module.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
    ],
)  # fmt: skip
def test_training_checkpoints_load(wrap, tmp_path, weights):
    model = tiny()
    load_pretrained(model, saved(wrap(weights, random_weights(model, seed=2)), tmp_path / "last.pth"))
    assert_holds(model, weights)


def test_the_averaged_weights_can_be_declined(tmp_path, weights):
    model = tiny()
    file = saved({"state_dict": weights, "state_dict_ema": random_weights(model, seed=2)}, tmp_path / "last.pth")
    load_pretrained(model, file, use_ema=False)
    assert_holds(model, weights)


def test_safetensors_load(tmp_path, weights):
    save_file(weights, tmp_path / "tiny.safetensors")
    model = tiny()
    load_pretrained(model, tmp_path / "tiny.safetensors")
    assert_holds(model, weights)


def test_safetensors_load_from_a_url(tmp_path, weights, server):
    save_file(weights, tmp_path / "tiny.safetensors")
    server.pages["/tiny.safetensors"] = page((tmp_path / "tiny.safetensors").read_bytes())
    model = tiny()
    load_pretrained(model, f"{server.url}/tiny.safetensors")
    assert_holds(model, weights)


def test_files_of_old_torch_versions_load(tmp_path, weights):
    model = tiny()
    load_pretrained(model, saved(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False))
    assert_holds(model, weights)


@pytest.mark.parametrize(
    "content",
    [[1, 2], 7, None, "text", {"epoch": 3}, {"state_dict": [1]}, {"state_dict": {"a": 1}}, {0: torch.ones(1)}],
    ids=repr,
)
def test_checkpoints_without_weights_are_named(content, tmp_path):
    file = saved(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        load_pretrained(tiny(), file)
    assert str(file) in str(error.value)


def test_extracting_takes_nothing_away():
    weights = random_weights(tiny())
    assert list(extract_state_dict(weights)) == list(weights)
    assert list(extract_state_dict({"state_dict": weights, "epoch": 1})) == list(weights)


# What is refused


class Intruder:
    """Pickled, it creates a file as soon as it is read."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return builtins.open, (str(self.victim), "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_a_checkpoint_does_not_run(form, tmp_path, weights, cache, server):
    victim, file = tmp_path / "victim", tmp_path / "evil.pth"
    content = {"state_dict": weights, "extra": Intruder(victim)}
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        saved(content, file, _use_new_zipfile_serialization=form == "zip")
    server.pages["/evil.pth"] = page(file.read_bytes())
    for source in (file, f"{server.url}/evil.pth"):
        with pytest.raises(CheckpointError, match="holds more than") as error:
            load_pretrained(tiny(), source)
        assert str(source) in str(error.value)
    assert list(cache.iterdir()) == []
    assert not victim.exists()

    read = pickle.loads(file.read_bytes()) if form == "bare pickle" else torch.load(file, weights_only=False)
    read["extra"].close()
    assert victim.exists()  # so the code would have run


def of_tensor(weights: StateDict, data: bytes) -> int:
    """Where the numbers of an entry begin in a file."""
    return data.index(weights["head.weight"].numpy().tobytes())


DAMAGES = {
    "half": lambda data, weights: data[: len(data) // 2],
    "last bytes": lambda data, weights: data[:-10],
    "bit of a tensor": lambda data, weights: flip(data, of_tensor(weights, data) + 5),
    "bit of a name": lambda data, weights: flip(data, data.index(b"head.weight") + 6),
    "zero bytes": lambda data, weights: b"",
    "text": lambda data, weights: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 36106025\n",
    "picture": lambda data, weights: b"\x89PNG\r\n\x1a\n" + data[:400],
}


def assert_refused(file: Path, **kwargs):
    """A CheckpointError that names the file, and a model as it was before."""
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, **kwargs) as error:
        load_pretrained(model, file)
    assert str(file) in str(error.value)
    assert_holds(model, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(damage, file, weights):
    file.write_bytes(DAMAGES[damage](file.read_bytes(), weights))
    assert_refused(file, match="damaged|truncated")


@pytest.mark.parametrize("damage", ["half", "last bytes", "zero bytes", "text", "picture"])
def test_damaged_safetensors_are_refused_by_name(damage, tmp_path, weights):
    file = tmp_path / "tiny.safetensors"
    save_file(weights, file)
    file.write_bytes(DAMAGES[damage](file.read_bytes(), weights))
    assert_refused(file, match="truncated")


def test_objects_other_than_plain_values_are_refused_by_name(tmp_path, weights):
    assert_refused(saved({"state_dict": weights, "args": Path("a")}, tmp_path / "args.pth"), match="plain values")


def test_missing_entries_are_named(tmp_path, weights):
    del weights["stages.1.blocks.1.connect.weight"], weights["tokenizer.block.1.running_var"]
    assert_refused(
        saved(weights, tmp_path / "less.pth"),
        match=r"tokenizer\.block\.1\.running_var is missing; stages\.1\.blocks\.1\.connect\.weight is missing$",
    )


def test_a_missing_head_is_named(tmp_path, weights):
    del weights["head.weight"], weights["head.bias"]
    assert_refused(saved(weights, tmp_path / "headless.pth"), match=r"head\.weight is missing; head\.bias is missing$")


def test_entries_too_many_are_named(tmp_path, weights):
    weights["aux_head.weight"] = torch.zeros(2)
    assert_refused(saved(weights, tmp_path / "more.pth"), match=r"aux_head\.weight is not in the model$")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("stages.0.blocks.0.norm1.weight", (9,), r"\(9,\), the model has \(8,\)$"),
        (FIRST_CONV, (2, 3, 5, 5), r"\(2, 3, 5, 5\), the model has \(2, 3, 3, 3\)$"),
        (FIRST_CONV, (2, 27), r"\(2, 27\), the model has \(2, 3, 3, 3\)$"),
        ("head.weight", (5, 23), r"\(5, 23\), the model has \(5, 24\)$"),
        ("head.bias", (4,), r"\(4,\), the model has \(5,\)$"),
        ("tokenizer.block.1.num_batches_tracked", (1,), r"\(1,\), the model has \(\)$"),
    ],
)
def test_entries_of_other_shapes_are_named(name, shape, message, tmp_path, weights):
    weights[name] = torch.zeros(shape)
    assert_refused(saved(weights, tmp_path / "reshaped.pth"), match=f"{name} is {message}")


def test_many_differences_are_counted(tmp_path):
    other = random_weights(tiny(blocks=(1, 3, 1)))
    assert_refused(
        saved(other, tmp_path / "deeper.pth"), match=r"(stages\.1\.blocks\.2\.\S+ is not in .*){3}and 12 more$"
    )


@pytest.mark.parametrize(
    ("file_of", "model_of", "difference"),
    [
        ("convmlp_s", "convmlp_m", "conv_stages.conv_blocks.2.0.weight is missing"),
        ("convmlp_s", "convmlp_l", "conv_stages.conv_blocks.2.0.weight is missing"),
        ("convmlp_m", "convmlp_s", "conv_stages.conv_blocks.2.0.weight is not in the model"),
        ("convmlp_m", "convmlp_l", "stages.0.blocks.3.norm1.weight is missing"),
        ("convmlp_l", "convmlp_s", "conv_stages.conv_blocks.2.0.weight is not in the model"),
        ("convmlp_l", "convmlp_m", "stages.0.blocks.3.norm1.weight is not in the model"),
    ],
)
def test_the_error_says_which_variant_a_file_belongs_to(file_of, model_of, difference):
    with torch.device("meta"):
        state_dict = getattr(convmlp, file_of)().state_dict()
        model = getattr(convmlp, model_of)(classifier_head=False)
    with pytest.raises(CheckpointError, match=f"It fits {file_of}$") as error:
        adapt_state_dict(state_dict, model, name="some.pth")
    assert f"some.pth does not fit the model: {difference}; " in str(error.value)


@pytest.mark.parametrize("variant", ["convmlp_s", "convmlp_m", "convmlp_l", "pure_mlp_s"])
@pytest.mark.parametrize("extra", [{}, dict(num_classes=7), dict(in_chans=1), dict(classifier_head=False)], ids=str)
def test_a_variant_is_known_whatever_its_head_and_channels(variant, extra):
    with torch.device("meta"):
        state_dict = build(**{**VARIANTS, **PURE_MLPS}[variant], **extra).state_dict()
    assert fitting_variant(state_dict) == variant
    assert fitting_variant(tiny().state_dict()) is None


def test_reading_gives_what_was_saved(tmp_path):
    content = {"epoch": 3, "names": ["a"], "x": torch.arange(3)}
    read = read_checkpoint(saved(content, tmp_path / "some.pth"))
    assert read.pop("x").equal(content.pop("x"))
    assert read == content
