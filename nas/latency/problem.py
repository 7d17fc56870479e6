"""From a table and a sheet to the regression they pose: rows, effects, prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from nas import tables
from nas.device import DeviceSheet
from nas.errors import NasError, UsageError, unknown
from nas.latency.ratios import Ratio, fitted
from nas.latency.regression import Ratios, Rows, Shrinkage, Solution, solve, solve_tied
from nas.latency.spread import Borrowed
from nas.op import FEATURES
from nas.tables import Measurement, Observation, Subject

RIDGES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# What each doubling beyond the near memory adds to a byte at first: a little, so that rows decide.
_FAR_SHARE = 0.05
CHIP_FACTORS = (1.0, 0.7, 0.5, 0.35, 0.25)
# Of an activation: most of what a network moves at these sizes. w8a16 has weights of half that.
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "w8a16": 2.0, "int8": 1.0}


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Prior uncertainties of a fit, from the sheet's [fit]; all relative (0.2 = 20 %).

    Attributes:
        row_sd: of one row, given everything; only its ratio to the others matters.
        chip_sd: of a chip's speed about the trend of the public figures.
        trend_sd: of the exponents of that trend.
        trend: figure of [chips] -> prior exponent: time falls with the figure to this power.
        block_sd: of blocks timed alone about the same operators inside a network.
        block_weight: weight of all blocks together, where a network weighs 1.
        prior: target (slug or alias) whose fitted costs the fit is shrunk towards; the sheet's roofline if empty.
        borrow_spread: with fewer networks than can say how wrong a fit is, take that from other targets (spread.json).
    """

    row_sd: float = 0.05
    chip_sd: float = 0.2
    trend_sd: float = 0.3
    trend: Mapping[str, float] = field(default_factory=dict)
    block_sd: float = 0.3
    block_weight: float = 10.0
    prior: str = ""
    borrow_spread: bool = False

    @classmethod
    def of(cls, sheet: DeviceSheet) -> FitSettings:
        """The sheet's settings over the defaults.

        Raises:
            UsageError: the sheet has a setting that does not exist.
        """
        known = [f.name for f in fields(cls)]
        for name in sheet.fit:
            if name not in known:
                raise unknown("key", f"fit.{name}", [f"fit.{k}" for k in known], where=str(sheet.path))
        return cls(**sheet.fit)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The rows of a fit with all that a part of it needs to be fitted again.

    Attributes:
        names: [n] what each row is; subjects: [n] its key.
        networks: [n] the network's key, "" for a block; rows of one network are held out together at any batch.
        chips: [n].
        ratios: published quotients; pairs: [m, 2] the networks each compares.
        shrinkage: the prior; its ridge is chosen among `RIDGES`.
        sheet_ridge: [E] ridges of the effects as the sheet has them.
        chip_effects: [E] which effects are a chip's deviation from the trend.
        target_effects: [E] the target's row of the effects design: its chip, a whole network.
        trend: whether public figures price a chip without rows; otherwise its own speed is not known at all.
        borrowed: what other targets say about fits of so many networks, where the sheet asks for it.
        tied: one multiple of the prior stands for all that an operator kind moves, one for all its MACs.
    """

    target: str
    names: np.ndarray
    subjects: np.ndarray
    networks: np.ndarray
    chips: np.ndarray
    rows: Rows
    ratios: Ratios
    pairs: np.ndarray
    shrinkage: Shrinkage
    sheet_ridge: np.ndarray
    chip_effects: np.ndarray
    target_effects: np.ndarray
    trend: bool
    borrowed: Mapping[int, Borrowed] = field(default_factory=dict)
    tied: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """The networks, in order."""
        return self.groups_in(np.ones(len(self.networks), dtype=bool))

    def groups_in(self, keep: np.ndarray) -> tuple[str, ...]:
        """The networks among the rows of a mask [n], in order."""
        return tuple(sorted(set(self.networks[keep]) - {""}))

    def shrunk(self, *, ridge: float | None = None, chip_sd: float = 1.0, tied: bool | None = None) -> Problem:
        """The same rows under another ridge, with the sheet's chip_sd times a factor, with features tied or not."""
        effect_ridge = np.where(self.chip_effects, self.sheet_ridge / chip_sd**2, self.sheet_ridge)
        kept = self.shrinkage.ridge if ridge is None else ridge
        shrinkage = replace(self.shrinkage, ridge=kept, effect_ridge=effect_ridge)
        return replace(self, shrinkage=shrinkage, tied=self.tied if tied is None else tied)

    def solve(self, keep: np.ndarray | None = None, near: Solution | None = None) -> Solution:
        """Fits the rows of a mask [n], and the ratios that do not speak of a network held out."""
        keep = np.ones(len(self.networks), dtype=bool) if keep is None else keep
        fits = solve_tied if self.tied else solve
        ratios = self.ratios
        if not ratios.empty:
            out = set(self.networks[~keep]) - set(self.networks[keep])
            touched = np.asarray(np.isin(self.pairs, list(out)).any(axis=1))
            ratios = ratios.take(~touched)
        return fits(self.rows.take(keep), self.shrinkage, ratios, near)

    def testable(self, test: np.ndarray, train: np.ndarray) -> np.ndarray:
        """The rows of `test` that a fit of `train` can be asked for: without a trend, only those of chips it saw."""
        return test if self.trend else test & np.isin(self.chips, np.unique(self.chips[train]))


def problem(
    measurements: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    prior: np.ndarray | None = None,
    ratios: Sequence[Ratio] = (),
) -> tuple[Problem, tuple[Observation, ...]]:
    """The regression that a table and a sheet pose, and the observations it rests on."""
    settings = FitSettings.of(sheet)
    found = _observations(measurements, subjects, sheet)
    blocks = np.array([o.kind == "block" for o in found], dtype=bool)
    design, target_effects, centre, ridge, of_chips = _effects(found, blocks, sheet, settings)
    rows = Rows(
        features=np.array([subjects[o.subject].vector for o in found]).reshape(len(found), len(FEATURES)),
        ms=np.array([o.ms for o in found]),
        effects=design,
        weights=np.where(blocks, settings.block_weight / max(1, int(blocks.sum())), 1.0),
    )
    quotients, keys = fitted(ratios, subjects, settings.row_sd)
    pairs = np.array([_network(subjects[key]) for key in keys.ravel()], dtype=object).reshape(keys.shape)
    costs = roofline(sheet) if prior is None else np.maximum(prior, prior[prior > 0].min(initial=np.inf) * 1e-3)
    posed = Problem(
        target=sheet.slug,
        names=np.array([subjects[o.subject].name for o in found], dtype=object),
        subjects=np.array([o.subject for o in found], dtype=object),
        networks=np.array(["" if o.kind == "block" else _network(subjects[o.subject]) for o in found], dtype=object),
        chips=np.array([o.chip for o in found], dtype=object),
        rows=rows,
        ratios=quotients,
        pairs=np.array([[_network(subjects[key]) for key in pair] for pair in pairs], dtype=object).reshape(
            pairs.shape
        ),
        shrinkage=Shrinkage(prior=costs, ridge=RIDGES[0], centre=centre, effect_ridge=ridge),
        sheet_ridge=ridge,
        chip_effects=of_chips,
        target_effects=target_effects,
        trend=bool(settings.trend) or not sheet.chips,
    )
    return posed, found


def _network(subject: Subject) -> str:
    """What is held out together: a published subject may say that it is another one's network at another batch."""
    return str(subject.spec.get("network", subject.key))


def _observations(
    measurements: Sequence[Measurement], subjects: Mapping[str, Subject], sheet: DeviceSheet
) -> tuple[Observation, ...]:
    """What is fitted, networks first: denoisers, their blocks and published networks on the sheet's chips.

    A pipeline part that is only charged (a component) is left out, and so are other chips where none are pooled.
    """
    pooled = bool(sheet.chips)
    mine = [
        row
        for row in measurements
        if row.subject_kind != "component" and (pooled or not sheet.chip or row.chip == sheet.chip)
    ]
    found = tables.observations(mine)
    for seen in found:
        if seen.subject not in subjects or not subjects[seen.subject].features:
            raise NasError(f"{sheet.slug}: a row of {seen.subject!r} is to be fitted but has no features")
        if pooled and seen.chip not in sheet.chips:
            raise unknown("chip", seen.chip, sheet.chips, where=f"the table of {sheet.slug}")
    return tuple(sorted(found, key=lambda o: (o.kind == "block", o.subject, o.chip)))


def roofline(sheet: DeviceSheet) -> np.ndarray:
    """[F] ms per unit of each feature from the sheet's [roofline].

    Features state bytes at float32 whatever the target; `ms_per_gb` is per gigabyte really moved, so it is scaled by
    the target's bytes per element over four.

    Raises:
        UsageError: a figure is missing or not positive, or the precision's size is not known.
    """
    for name in ("ms_per_gmac", "ms_per_gb", "ms_per_op"):
        value = sheet.roofline.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise UsageError(f"{sheet.path}: roofline.{name} must be a positive number, got {value!r}")
    if sheet.target.precision not in BYTES:
        raise unknown("precision", sheet.target.precision, BYTES, where=str(sheet.path))
    per_gb = float(sheet.roofline["ms_per_gb"]) * BYTES[sheet.target.precision] / 4
    per_unit = {
        "macs": float(sheet.roofline["ms_per_gmac"]),
        "few_macs": float(sheet.roofline["ms_per_gmac"]),
        **dict.fromkeys(("bytes", "read", "written"), per_gb),
        "far": _FAR_SHARE * per_gb,
        "count": float(sheet.roofline["ms_per_op"]) * 1e3,
    }
    return np.array([per_unit[name.partition(".")[2]] for name in FEATURES])


def _effects(
    found: Sequence[Observation], blocks: np.ndarray, sheet: DeviceSheet, settings: FitSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The log-linear factors of rows: design [n, E]; and per effect the target's row, prior mean, ridge, chip or not.

    A chip's factor is the product of its figures over the target's, each to a power, and a deviation of its own; a
    block alone has one factor more (warm caches make it faster than the same operators inside a network).
    """
    columns, target, centre, sds, of_chip = [], [], [], [], []
    if sheet.chips:
        chips = sorted({o.chip for o in found} | {sheet.chip})
        for figure, power in settings.trend.items():
            at_target = float(sheet.chips[sheet.chip][figure])
            columns.append([-np.log(float(sheet.chips[o.chip][figure]) / at_target) for o in found])
            target.append(0.0)
            centre.append(power)
            sds.append(settings.trend_sd)
            of_chip.append(False)
        for chip in chips:
            columns.append([float(o.chip == chip) for o in found])
            target.append(float(chip == sheet.chip))
            centre.append(0.0)
            sds.append(settings.chip_sd)
            of_chip.append(True)
    if blocks.any():
        columns.append([float(block) for block in blocks])
        target.append(0.0)
        centre.append(0.0)
        sds.append(settings.block_sd)
        of_chip.append(False)
    design = np.array(columns, dtype=float).reshape(len(columns), len(found)).T
    ridge = (settings.row_sd / np.array(sds, dtype=float)) ** 2
    return design, np.array(target, float), np.array(centre, float), ridge, np.array(of_chip, bool)
