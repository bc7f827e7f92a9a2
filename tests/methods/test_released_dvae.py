"""OpenAI's encoder.pkl and decoder.pkl: pickled whole modules, read without their classes; anything else in such a file is refused."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import golden, section
from PIL import Image
from torch import nn

from harness.cli import main
from harness.spec import UserError
from methods.dalle import Decoder, decode, load_decoder, load_tokenizer, read_released

ARRAYS = golden("dalle_encoder")
ENCODER, DECODER = (next(k.split("/")[0] for k in ARRAYS if k.startswith(f"{part}_blocks")) for part in ("encoder", "decoder"))
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # torch's old format stores the source of classes; the stubs have none
Stubs = Callable[[str], type[nn.Module]]


@pytest.fixture
def stubs() -> Any:
    """Classes under the names of OpenAI's package, there while a file is written and gone while it is read."""
    made: dict[str, type[nn.Module]] = {}

    def stub(dotted: str) -> type[nn.Module]:
        module, _, name = dotted.rpartition(".")
        if dotted not in made:
            sys.modules.setdefault("dall_e", types.ModuleType("dall_e"))
            made[dotted] = type(name, (nn.Module,), {"__module__": module})
            setattr(sys.modules.setdefault(module, types.ModuleType(module)), name, made[dotted])
        return made[dotted]

    yield stub
    remove()


def remove() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "dall_e"]:
        del sys.modules[name]


def original(case: str, stub: Stubs) -> nn.Module:
    """The module tree that dall_e's attrs classes make, with the recorded weights."""
    part = case.partition("_")[0]
    root = stub(f"dall_e.{part}.{part.title()}")()
    root.n_hid, root.device = 8, torch.device("cpu")
    for key, value in section(ARRAYS, f"{case}/state").items():
        place = root
        for name in (parts := key.split("."))[:-1]:
            if not hasattr(place, name):
                leaf = name == parts[-2]
                block = stub(f"dall_e.{part}.{part.title()}Block") if name.startswith("block_") else nn.Sequential
                place.add_module(name, (stub("dall_e.utils.Conv2d") if leaf else block)())
                if name.startswith("conv_"):
                    place.add_module(f"relu_{name[5:]}", nn.ReLU())
            place = getattr(place, name)
        setattr(place, parts[-1], nn.Parameter(value))
    if part == "encoder":
        root.blocks.group_1.add_module("pool", nn.MaxPool2d(2))
    return root


@pytest.mark.parametrize("zipped", [True, False])
def test_openais_pickles_give_openais_tokens(zipped: bool, stubs: Stubs, tmp_path: Path) -> None:
    for case in (ENCODER, DECODER):
        torch.save(original(case, stubs), tmp_path / f"{case}.pkl", _use_new_zipfile_serialization=zipped)
    remove()
    tokens = load_tokenizer(tmp_path / f"{ENCODER}.pkl")(torch.from_numpy(ARRAYS["pixels"]) * 255)
    np.testing.assert_array_equal(tokens.numpy(), ARRAYS[f"{ENCODER}/tokens"].reshape(len(tokens), -1))
    decoder = read_released(tmp_path / f"{DECODER}.pkl")
    assert isinstance(decoder, Decoder)
    codes = torch.from_numpy(ARRAYS[f"{DECODER}/input_tokens"])
    with torch.no_grad():
        output = decoder(nn.functional.one_hot(codes, ARRAYS[f"{DECODER}/state/blocks.input.w"].shape[1]).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(output.numpy(), ARRAYS[f"{DECODER}/output"], atol=2e-5)
    with pytest.raises(UserError, match="decoder"):
        load_tokenizer(tmp_path / f"{DECODER}.pkl")


def test_the_decoder_beside_the_encoder_makes_pictures_if_it_is_there(stubs: Stubs, tmp_path: Path) -> None:
    encoder, decoder = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    assert load_decoder(encoder) == "decoder.pkl does not lie beside encoder.pkl"
    torch.save(original(DECODER, stubs), decoder)
    remove()
    found = load_decoder(encoder)
    assert isinstance(found, Decoder)
    pixels = decode(found, torch.from_numpy(ARRAYS[f"{DECODER}/input_tokens"]))
    np.testing.assert_allclose(pixels.numpy(), ARRAYS[f"{DECODER}/reconstruction"], atol=2e-5)
    decoder.write_bytes(decoder.read_bytes()[:100])  # pictures are no reason to end a training
    assert load_decoder(encoder) == "the tokenizer's decoder cannot be read (UserError)"


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "inside a module", "module that is none of dall_e's"])
def test_a_malicious_pickle_is_refused(how: str, stubs: Stubs, tmp_path: Path) -> None:
    file, trace = tmp_path / "encoder.pkl", tmp_path / "trace"
    evil: Any = Evil((os.system, (f"touch {trace}",)))
    if how == "inside a module":
        encoder = original(ENCODER, stubs)
        encoder.extra, evil = Evil((open, (str(trace), "w"))), encoder
    if how.startswith("module that"):
        evil = stubs("dall_e.encoder.Trap")()
    if how == "pickle":
        file.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=how == "zip")
    remove()
    with pytest.raises(UserError, match="refused") as caught:
        load_tokenizer(file)
    assert not trace.exists() and "\n" not in str(caught.value)


def test_other_modules_and_broken_files_are_refused(stubs: Stubs, tmp_path: Path) -> None:
    encoder = original(ENCODER, stubs)
    del encoder.blocks.output.conv.b
    torch.save(encoder, tmp_path / "part.pkl")
    torch.save(original(ENCODER, stubs), tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    remove()
    whole = (tmp_path / "old.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"blocks\.output\.conv\.bias"):
        read_released(tmp_path / "part.pkl")
    with pytest.raises(UserError, match="damaged"):
        read_released(tmp_path / "cut.pkl")
    with pytest.raises(UserError, match="cannot be read"):
        read_released(tmp_path / "none.pkl")


@pytest.mark.parametrize("file", ["malicious", "text", "decoder"])
def test_a_wrong_tokenizer_is_found_before_anything_starts(file: str, stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the dry run is content, and the job fails on the cluster."""
    trace, data = tmp_path / "trace", tmp_path / "data"
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (data / "imagenet" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(data / "imagenet" / split / name / "a.png")
    (data / "dall-e").mkdir()
    if file == "text":
        (data / "dall-e" / "encoder.pkl").write_bytes(b"<html>not found</html>")
    else:
        torch.save(Evil((os.system, (f"touch {trace}",))) if file == "malicious" else original(DECODER, stubs), data / "dall-e" / "encoder.pkl")
    remove()
    line = ["run", "--methods", "beit", "--evals", "linear", "--protocol", "paper", "--data", str(data), "--runs", str(tmp_path / "runs"), "--dry-run"]
    assert main(line) == 2 and not trace.exists() and not (tmp_path / "runs").exists()
    (said,) = capsys.readouterr().err.splitlines()
    assert "encoder.pkl" in said and {"malicious": "refused", "text": "no checkpoint", "decoder": "holds a decoder"}[file] in said
