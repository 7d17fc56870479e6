"""Predicted peak activation memory against real runs: python benchmarks/peak_memory.py [--px 256 512].

Predicted: `nas.cost.network_peak_bytes` over the blocks' traces, as searches price it. Measured: one call of the same
network, full size, float32, random weights, batch 1, on the CPU, two ways.

* tensors: after every operator that torch dispatches, the bytes of all tensor storages that are still referenced; the
  peak of that is the figure. It is what the prediction claims to say, and knows nothing of how the prediction is made:
  Python decides what lives.
* allocator: the running sum of torch's own allocation events (`torch.profiler`, profile_memory). It also holds what a
  kernel needs for itself while it runs: oneDNN's reordered copies of convolution weights, which are larger than all
  activations at a small latent, and the masks inside torch's softmax. These depend on the kernel, not on the network.

Weights are left out on both sides; the inputs of the network are counted on both. Attention runs through torch's "math"
kernel, because the trace charges attention unfused (scores and their softmax are buffers). Writes
reports/benchmarks/peak_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nas import families
from nas.build import build, example_inputs
from nas.cost import network_peak_bytes
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.space import load_space
from nas.trace import block_trace

OUT = Path(__file__).resolve().parent.parent / "reports" / "benchmarks" / "peak_memory.json"
NETWORKS = (("snapgen_unet", "snapgen"), ("sd_unet", "sd-v1.5"), ("sdxl_unet", "koala-700m"))
LIMIT = 0.15


class Alive(TorchDispatchMode):
    """The bytes of the storages that operators made and something still refers to, and their peak."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.held: dict[int, tuple[int, int]] = {}
        self.peak_bytes = 0
        self.operator = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # First what has died: its address may have been given to a result.
        for key, (weak, _) in list(self.held.items()):
            if torch.UntypedStorage._expired(weak):
                torch.UntypedStorage._free_weak_ref(weak)
                del self.held[key]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.held:
                    self.held[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        alive = sum(size for _, size in self.held.values())
        if alive > self.peak_bytes:
            self.peak_bytes, self.operator = alive, str(func)
        return result


def tensor_peak(network: nn.Module, given: Mapping[str, Tensor]) -> tuple[int, str]:
    """Most bytes of live tensors during one call, weights and inputs left out, and the operator after which."""
    known = {t.untyped_storage()._cdata for t in [*network.parameters(), *given.values()]}
    with Alive(known) as alive:
        network(**given)
    return alive.peak_bytes, alive.operator


def allocator_peak(network: nn.Module, given: Mapping[str, Tensor]) -> int:
    """Most bytes that torch's allocator has given out and not got back during one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        network(**given)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(space_name: str, reference: str, px: int) -> dict[str, Any]:
    """One network at one resolution."""
    spec = families.network(load_space(space_name).at_resolution(px).reference(reference))
    predicted = network_peak_bytes(spec.blocks, [block_trace(block).peak_bytes for block in spec.blocks])
    network = build(spec, seed=0).eval()
    given = example_inputs(spec, generator=torch.Generator().manual_seed(0))
    inputs = sum(t.untyped_storage().nbytes() for t in given.values())
    start = time.perf_counter()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tensors, operator = tensor_peak(network, given)
        seconds = time.perf_counter() - start
        allocated = allocator_peak(network, given)
    return {
        "space": space_name,
        "network": reference,
        "resolution_px": px,
        "latent": [spec.input.height, spec.input.width],
        "predicted_bytes": predicted,
        "tensors_bytes": tensors + inputs,
        "deviation": predicted / (tensors + inputs) - 1,
        "at_operator": operator,
        "allocator_bytes": allocated + inputs,
        "allocator_deviation": predicted / (allocated + inputs) - 1,
        "weight_bytes": sum(p.numel() * p.element_size() for p in network.parameters()),
        "call_s": round(seconds, 2),
    }


def main() -> None:
    """Runs all networks, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = [measure(space, reference, px) for px in options.px for space, reference in NETWORKS]
    worst = max(rows, key=lambda row: abs(row["deviation"]))
    found = {
        "conditions": {
            "what": "one call, batch 1, float32, full-size random weights, CPU, attention by torch's math kernel;"
            " weights left out and inputs counted on both sides",
            "threads": torch.get_num_threads(),
            "load_average": list(os.getloadavg()),
        },
        "networks": rows,
        "worst_deviation": worst["deviation"],
        "limit": LIMIT,
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out, json.dumps(found, indent=2) + "\n")
    print(f"{'network':12s} {'px':>5s} {'predicted':>12s} {'tensors':>12s} {'deviation':>9s} {'allocator':>12s}")
    for row in rows:
        predicted, tensors, allocator = (row[f"{name}_bytes"] / 2**20 for name in ("predicted", "tensors", "allocator"))
        print(
            f"{row['network']:12s} {row['resolution_px']:5d} {predicted:8.1f} MiB {tensors:8.1f} MiB"
            f" {row['deviation']:+9.1%} {allocator:8.1f} MiB  after {row['at_operator']}"
        )
    print(f"wrote {options.out}")
    print(
        f"peak activation bytes, predicted against live tensors of a real run: worst of {len(rows)} is"
        f" {worst['deviation']:+.1%} ({worst['network']} at {worst['resolution_px']} px), limit {LIMIT:.0%}"
    )


if __name__ == "__main__":
    main()
