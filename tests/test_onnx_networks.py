"""Networks as ONNX, put together from cached graphs of blocks: they compute what torch does, whatever the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx as onnx_library
import onnxruntime
import pytest
import torch
from torch import Tensor

from nas import families
from nas.build import Network, build, example_inputs
from nas.errors import NasError
from nas.exporters import onnx
from nas.exporters.onnx import compose, graphs, weights
from nas.network import BlockSpec, InputShape, NetworkSpec, block
from nas.space import load_space

RELATIVE = 1e-4
SHAPE = InputShape(channels=4, height=8, width=8, text_tokens=5, text_width=12)
DIT = {
    "width": 32,
    "heads": 4,
    "patch_size": 2,
    "depth": 2,
    "kv_sharing": "gqa",
    "ffn_ratio": 2,
    "attention": "full",
    "text": "cross",
    "window": 4,
}


def small(space: str, reference: str, text_tokens: int = 5, text_width: int = 24) -> NetworkSpec:
    loaded = load_space(space)
    scale = families.Scale(
        width_divisor=16,
        head_width=4,
        norm_groups=4,
        latent_channels=loaded.input.latent_channels,
        height=8,
        width=8,
        text_tokens=text_tokens,
        text_width=text_width,
    )
    return families.scaled(loaded.reference(reference), scale)


def decoder(reference: str) -> NetworkSpec:
    return families.network(load_space("decoder").at_resolution(16).reference(reference))


def dit(**changes: object) -> NetworkSpec:
    return families.network_of("dit", {**DIT, **changes}, SHAPE, name="small")  # type: ignore[dict-item]


NETWORKS = {
    "snapgen": lambda: small("snapgen_unet", "snapgen"),
    "bk-sdm-tiny": lambda: small("sd_unet", "bk-sdm-tiny"),
    "koala-700m": lambda: small("sdxl_unet", "koala-700m"),
    "dit": lambda: dit(),
    "dit-joint": lambda: dit(text="joint", depth=3),
    "dit-staged": lambda: dit(stages=3, down_depth=1, middle_depth=1, up_depth=1),
    "taesd": lambda: decoder("taesd"),
    "snapgen-tiny": lambda: decoder("snapgen-tiny"),
}


def perturbed(spec: NetworkSpec, seed: int = 0) -> Network:
    """A network no two of whose weights are equal by construction, as after training."""
    network = build(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def relative(path: Path, network: Network, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        largest = float(network.eval()(**inputs).abs().max())
    return onnx.verify(path, network, inputs) / largest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, on disk and in memory."""
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    graphs.block_graph.cache_clear()
    yield tmp_path / "cache" / "onnx"
    graphs.block_graph.cache_clear()


RESNET = {"in_channels": 4, "out_channels": 4, "time_width": 8, "norm_groups": 2}


def two_resnets() -> NetworkSpec:
    """Two blocks that differ in their names only, and one more."""
    shape = {"x": (4, 8, 8), "temb": (8,)}
    embedding = block(
        "time_embedding", "time_embedding", {"timestep": ()}, writes=("temb",), frequency_width=8, time_width=8
    )
    blocks = (
        embedding,
        block("down_blocks.0.resnets.0", "resnet", shape, **RESNET),
        block("down_blocks.0.resnets.1", "resnet", shape, **RESNET),
    )
    return NetworkSpec(name="pair", input=InputShape(channels=4, height=8, width=8), blocks=blocks)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_composed_network_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    network = perturbed(NETWORKS[name]())
    inputs = example_inputs(network.spec, generator=torch.Generator().manual_seed(1))
    path = onnx.export(network, inputs, tmp_path / "network.onnx")
    assert relative(path, network, inputs) < RELATIVE
    other = {key: tensor + 0.5 for key, tensor in inputs.items()}
    assert relative(path, network, other) < RELATIVE
    nodes = onnx_library.load(str(path)).graph.node
    blocks = {b.name for b in network.spec.blocks}
    assert {n.name.partition(onnx.SEPARATOR)[0] for n in nodes[:-1]} == blocks
    assert nodes[-1].op_type == "Identity"
    assert len({n.name for n in nodes}) == len(nodes)


def test_a_batch_is_exported_as_such(tmp_path: Path) -> None:
    network = perturbed(two_resnets())
    inputs = example_inputs(network.spec, batch=3)
    path = onnx.export(network, inputs, tmp_path / "network.onnx")
    assert relative(path, network, inputs) < RELATIVE
    output = onnx_library.load(str(path)).graph.output[0]
    assert [axis.dim_value for axis in output.type.tensor_type.shape.dim] == [3, 4, 8, 8]


def test_the_weights_of_now_are_written_not_those_of_before(tmp_path: Path, cache: Path) -> None:
    spec = two_resnets()
    inputs = example_inputs(spec)
    fresh = build(spec, seed=0)  # norms all ones and zeros: the exporter would make one weight of them
    ones = [p for p in fresh.parameters() if float(p.detach().std()) == 0.0]
    assert len(ones) >= 8
    assert relative(onnx.export(fresh, inputs, tmp_path / "a.onnx"), fresh, inputs) < RELATIVE
    trained = perturbed(spec, seed=3)
    path = onnx.export(trained, inputs, tmp_path / "a.onnx")
    assert relative(path, trained, inputs) < RELATIVE
    assert onnx.verify(path, fresh, inputs) > 1e-3
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    assert onnx.verify(onnx.export(trained, inputs, path), trained, inputs) == 0.0


def test_equal_blocks_share_one_file_and_later_networks_export_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = perturbed(two_resnets())
    inputs = example_inputs(network.spec)
    onnx.export(network, inputs, tmp_path / "a.onnx")
    assert sorted(p.name.split("-")[1] for p in cache.iterdir()) == ["resnet", "time_embedding"]
    graphs.block_graph.cache_clear()

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(graphs, "trace", refuse)
    assert relative(onnx.export(network, inputs, tmp_path / "b.onnx"), network, inputs) < RELATIVE


def test_changed_code_of_a_block_is_exported_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = two_resnets()
    compose(build(spec), example_inputs(spec))
    before = set(cache.iterdir())
    graphs.block_graph.cache_clear()
    unchanged = graphs.code_hash
    monkeypatch.setattr(graphs, "code_hash", lambda kind: "other" if kind == "resnet" else unchanged(kind))
    compose(build(spec), example_inputs(spec))
    assert [p.name.split("-")[1] for p in set(cache.iterdir()) - before] == ["resnet"]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_file_is_made_again(cache: Path, tmp_path: Path, damage: str) -> None:
    network = perturbed(two_resnets())
    inputs = example_inputs(network.spec)
    onnx.export(network, inputs, tmp_path / "a.onnx")
    path = next(p for p in cache.iterdir() if "resnet" in p.name)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes({"empty": b"", "cut": whole[:-40], "changed": bytes(changed), "foreign": b"\x08\x07" * 99}[damage])
    graphs.block_graph.cache_clear()
    assert relative(onnx.export(network, inputs, tmp_path / "a.onnx"), network, inputs) < RELATIVE
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise NasError("cannot write: no space left")

    monkeypatch.setattr(graphs, "atomic_write", full)
    network = perturbed(two_resnets())
    inputs = example_inputs(network.spec)
    assert relative(onnx.export(network, inputs, tmp_path / "a.onnx"), network, inputs) < RELATIVE
    assert not list(cache.iterdir())


_WRITER = """
import sys
from nas.build import build, example_inputs
from nas.exporters import onnx
from tests.test_onnx_networks import two_resnets
spec = two_resnets()
onnx.export(build(spec, seed=0), example_inputs(spec), sys.argv[1])
"""


@pytest.mark.slow
def test_processes_may_fill_one_cache_at_once(cache: Path, tmp_path: Path, root: Path) -> None:
    environment = {**os.environ, "NAS_CACHE": str(cache.parent)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / f"{i}.onnx")],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors.decode()
    assert len({(tmp_path / f"{i}.onnx").read_bytes() for i in range(3)}) == 1
    assert len(list(cache.iterdir())) == 2, "a temporary file was left"


def test_large_networks_lie_beside_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = perturbed(two_resnets())
    inputs = example_inputs(network.spec)
    monkeypatch.setattr(weights, "INLINE_BYTES", 1000)
    path = onnx.export(network, inputs, tmp_path / "network.onnx")
    beside = tmp_path / "network.onnx.data"
    assert sorted(tmp_path.iterdir()) == [path, beside]
    assert beside.stat().st_size >= 4 * sum(p.numel() for p in network.parameters())
    assert relative(path, network, inputs) < RELATIVE
    places = [
        (entry.key, int(entry.value))
        for tensor in onnx_library.load(str(path), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key in ("offset", "length")
    ]
    assert {offset % 4096 for key, offset in places if key == "offset"} == {0}
    monkeypatch.undo()
    onnx.export(network, inputs, path)
    assert not beside.exists(), "the weights of an earlier export are left"


def test_an_input_that_no_block_reads_may_be_given(tmp_path: Path) -> None:
    network = perturbed(two_resnets())
    inputs = {**example_inputs(network.spec), "text": torch.randn(1, 5, 12)}
    path = onnx.export(network, inputs, tmp_path / "network.onnx")
    assert relative(path, network, inputs) < RELATIVE
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["sample", "timestep", "text"]


def test_half_precision_is_exported_in_half_precision(tmp_path: Path) -> None:
    network = perturbed(two_resnets())
    inputs = {name: tensor.half() for name, tensor in example_inputs(network.spec).items()}
    path = onnx.export(network.half(), inputs, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {i.type for i in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float16)"}
    assert relative(path, network, inputs) < 0.02


def test_a_network_without_a_weight_that_its_graph_reads_is_refused(tmp_path: Path) -> None:
    model = compose(build(two_resnets()), example_inputs(two_resnets()))
    kept = {n: p.detach() for n, p in build(two_resnets()).named_parameters() if not n.endswith("conv1.weight")}
    with pytest.raises(NasError, match=r"reads 'down_blocks\.0\.resnets\.0\.conv1\.weight' of shape \[4, 4, 3, 3\]"):
        weights.save(model, kept, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_what_depends_on_constants_only_is_computed_once() -> None:
    spec = next(b for b in small("snapgen_unet", "snapgen").blocks if b.kind == "transformer")
    anonymous = BlockSpec(name="t", kind=spec.kind, settings=spec.settings, inputs=spec.inputs)
    graph = onnx_library.load_from_string(graphs.block_graph(anonymous, 1, torch.float32)).graph
    assert not {"Constant", "Shape", "ConstantOfShape"} & {node.op_type for node in graph.node}
    parameters = {n for n, _ in build(NetworkSpec(name="n", input=SHAPE, blocks=(anonymous,))).t.named_parameters()}
    assert {t.name for t in graph.initializer if not t.HasField("raw_data")} == parameters
