"""What a profile says of speed in sentences: for the page and the command line alike."""

from __future__ import annotations

from nas.page.numbers import milliseconds, percent, significant
from nas.profile.measured import Measured
from nas.profile.network import Profile
from nas.profile.words import difference

_BUSY = 1.5  # wall over CPU time from which on a machine was not quiet


def roof_statements(profile: Profile) -> list[str]:
    """What the device's roof is, where it is from, and what lies above it."""
    roof, rates = profile.roof, profile.rates
    if roof is None:
        return []
    whole = {b: float(rates[f"{b}_ms"].sum(min_count=1)) for b in ("measured", "predicted")}
    basis = "measured" if profile.measured is not None else "predicted"
    said = [
        f"The roof of {roof.target} is {significant(roof.gmac_s)} GMAC/s and {significant(roof.gb_s)} GB/s, from"
        f" [roofline] of its sheet: {roof.source}"
    ]
    if whole[basis] > 0:
        speed = profile.total.macs / 1e6 / whole[basis]
        said.append(
            f"{profile.name} does {significant(speed)} GMAC/s ({basis}): {percent(speed / roof.gmac_s)} of that"
        )
    above = int((rates[f"{basis}_of_roof"] > 1).sum())
    if above:
        said.append(
            f"{above} of {len(rates)} blocks lie above the roof: the sheet's figures are a first guess that fits start"
            " from, not a limit of the device"
        )
    return said


def measured_statements(profile: Profile) -> list[str]:
    """What was timed here, beside what is predicted."""
    measured, latency = profile.measured, profile.latency
    if measured is None:
        return []
    conditions = ", ".join(f"{k} {v}" if k != "runtime" else str(v) for k, v in measured.environment.items())
    said = [
        f"Measured on this machine: {milliseconds(measured.whole_ms)} a call ({measured.protocol}; {conditions}; wall"
        f" over CPU time {measured.contention:.2f})"
    ]
    if latency is not None:
        inside = latency.low_ms <= measured.whole_ms <= latency.high_ms
        said.append(
            f"Predicted: {milliseconds(latency.ms)}, {difference(latency.ms / measured.whole_ms - 1)} against measured,"
            f" which lies {'inside' if inside else 'outside'} the {percent(latency.confidence)} interval of"
            f" {milliseconds(latency.low_ms)} to {milliseconds(latency.high_ms)}"
        )
    if measured.other_chip:
        said.append(
            f"The prediction is for another chip ({measured.other_chip}) than this machine's ({measured.chip}): the two"
            " figures need not agree"
        )
    if measured.contention > _BUSY:
        said.append(
            f"Others computed on the same core (wall over CPU time {measured.contention:.1f}): CPU time leaves waiting"
            " out, but not what sharing the caches costs, and the kernels' wall times are unsteady"
        )
    return [*said, _block_sum(measured), *_nodes(measured)]


def _block_sum(measured: Measured) -> str:
    return (
        f"Its {len(measured.blocks_ms)} blocks ({measured.distinct} distinct) timed alone add up to"
        f" {milliseconds(measured.block_sum_ms)}, {percent(measured.block_sum_over_whole)} of the whole; of small"
        " networks such a sum is known to be about 90 %, probably because a block alone finds its weights and"
        " activations in the caches"
    )


def _nodes(measured: Measured) -> list[str]:
    nodes = measured.nodes
    if nodes is None:
        return []
    lost = sum(node.ms for node in nodes.unmapped)
    return [
        f"onnxruntime's own profile of the fastest of {nodes.calls} calls has {milliseconds(nodes.kernel_ms)} of"
        f" kernels (wall time) in {milliseconds(nodes.call_ms)}: {100 * nodes.mapped_share:.2f} % of them belong to a"
        f" block, {100 * (1 - nodes.mapped_share):.2f} % ({lost:.3f} ms, {len(nodes.unmapped)} of {len(nodes.nodes)}"
        " nodes) could not be mapped"
    ]
