"""A study folder made up in the test: realistic in form and size, and the same for the same seed."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np

CHOICES = {
    "width_0": [128, 192, 256, 320],
    "width_1": [256, 384, 512, 640],
    "width_2": [512, 640, 768, 896, 1024],
    "conv_0": ["full", "separable-1", "separable-2"],
    "depth_0": [0, 1, 2],
    "depth_1": [0, 1, 2, 3],
    "depth_2": [1, 2, 4, 6],
    "self_attention_1": [False, True],
    "attention": ["mqa", "gqa", "mha"],
    "qk_norm": ["none", "rms_norm"],
    "ffn_ratio": [2, 3, 4],
}
SNAPGEN = dict(zip(CHOICES, [256, 512, 896, "separable-2", 1, 2, 4, False, "mqa", "rms_norm", 3], strict=True))
STAGES = [
    "conv_in",
    "time_embedding",
    "down_blocks.0",
    "down_blocks.1",
    "down_blocks.2",
    "mid_block",
    "up_blocks.0",
    "up_blocks.1",
    "up_blocks.2",
    "head",
]
FIXED_MS, CALLS, BUDGET_MS, CONFIDENCE = 125.3, 4, 1400.0, 0.8
ELSEWHERE, LATENCIES = "galaxy-s24", ("latency_ms", "latency_low_ms", "latency_high_ms")
COLUMNS = [
    "number",
    "key",
    "state",
    "source",
    "reason",
    "params",
    "macs",
    "weight_bytes",
    "peak_activation_bytes",
    "step_ms",
    "latency_ms",
    "latency_low_ms",
    "latency_high_ms",
    "meets_budget_probability",
    "feasible",
    "quality",
    "quality_sd",
    "text_quality",
    "text_quality_sd",
    "seconds",
]


def _row(number, values, source, rng):
    size = values["width_0"] / 256 * 0.2 + values["width_1"] / 512 * 0.3 + values["width_2"] / 896 * 0.5
    depth = 0.4 * values["depth_0"] + values["depth_1"] * 0.6 + values["depth_2"] * 0.7
    heavy = {"full": 1.9, "separable-1": 0.8, "separable-2": 1.0}[values["conv_0"]]
    step = 30 + 95 * size**1.4 * heavy + 33 * size * depth * (1.5 if values["self_attention_1"] else 1.0)
    total = FIXED_MS + CALLS * step
    quality = 11 + 2.4 * np.log(step / 100) + (0.4 if values["qk_norm"] == "rms_norm" else 0) + rng.normal(0, 0.35)
    high = total + 0.14 * CALLS * step
    feasible = bool(high <= BUDGET_MS)
    proxied = feasible or source.startswith("reference")
    active = {k: v for k, v in values.items() if not (k == "self_attention_1" and values["depth_1"] == 0)}
    params = int(3.8e8 * size**1.6 * (0.5 + 0.1 * depth))
    return {
        "number": number,
        "key": hashlib.sha256(repr(sorted(active.items())).encode()).hexdigest()[:10],
        "state": "proxied" if proxied else "infeasible",
        "source": source,
        "reason": "" if feasible else f"latency bound {high - BUDGET_MS:.0f} ms over the budget",
        "params": params,
        "macs": int(step * 2.4e9),
        "weight_bytes": params * 2,
        "peak_activation_bytes": int(4e7 * values["width_0"] / 128),
        "step_ms": step,
        "latency_ms": total,
        "latency_low_ms": total - 0.12 * CALLS * step,
        "latency_high_ms": high,
        "meets_budget_probability": float(1 / (1 + np.exp((total - BUDGET_MS) / (0.1 * CALLS * step)))),
        "feasible": feasible,
        "quality": quality if proxied else "",
        "quality_sd": 0.09 if proxied else "",
        "text_quality": quality - 9 if proxied else "",
        "text_quality_sd": 0.2 if proxied else "",
        "seconds": 7.5 if proxied else "",
        **{f"choice.{k}": active.get(k, "") for k in values},
    }


def _front(rows):
    rows = [r for r in rows if r["state"] == "proxied" and r["feasible"]]
    return sorted(
        (a for a in rows if not any(b["latency_ms"] < a["latency_ms"] and b["quality"] > a["quality"] for b in rows)),
        key=lambda r: r["latency_ms"],
    )


def _blocks(member, rng):
    weights = rng.dirichlet(np.array([0.3, 0.05, 3, 3, 4, 3, 5, 4, 3, 0.3]) * 8)
    kinds = {"conv_in": "stem", "time_embedding": "time_embedding", "head": "head"}
    rows = []
    for stage, weight in zip(STAGES, weights, strict=True):
        split = [(kinds[stage], 1.0)] if stage in kinds else [("separable", 0.45), ("transformer", 0.55)]
        for kind, share in split:
            rows.append(
                {
                    "key": member["key"],
                    "block": stage if stage in kinds else f"{stage}.{kind}.0",
                    "kind": kind,
                    "stage": stage,
                    "params": int(member["params"] * weight * share),
                    "macs": int(member["macs"] * weight * share),
                    "weight_bytes": int(member["weight_bytes"] * weight * share),
                    "step_ms": member["step_ms"] * weight * share,
                    "share": weight * share,
                }
            )
    return rows


def _write(path, columns, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def make_study(folder: Path, trials: int = 90, seed: int = 0, first_version: bool = False) -> Path:
    """Writes study.json, trials.csv, front.csv and blocks.csv into `folder`.

    With `first_version` study.json has only what the first version wrote.
    """
    rng = np.random.default_rng(seed)
    rows = [_row(0, SNAPGEN, "reference:snapgen", rng)]
    for number in range(1, trials):
        values = {k: v[rng.integers(len(v))] for k, v in CHOICES.items()}
        rows.append(_row(number, values, "search", rng))
    rows.append({**rows[-1], "number": trials, "state": "duplicate"})
    front = _front(rows)
    chosen = _recommended(front)
    folder.mkdir(parents=True, exist_ok=True)
    columns = COLUMNS + [f"choice.{k}" for k in CHOICES]
    if not first_version:
        columns += [f"{name}@{ELSEWHERE}" for name in LATENCIES]
        for row in rows:
            row.update({f"{name}@{ELSEWHERE}": 0.55 * row[name] for name in LATENCIES})
    _write(folder / "trials.csv", columns, rows)
    _write(folder / "front.csv", columns, front)
    blocks = [block for member in front for block in _blocks(member, rng)]
    _write(folder / "blocks.csv", list(blocks[0]), blocks)
    record = _record(folder, rows, chosen) | ({} if first_version else _since(rows))
    (folder / "study.json").write_text(json.dumps(record, indent=1))
    return folder


def _recommended(front):
    """The fastest whose quality is within two standard deviations of the best one's."""
    best = max(front, key=lambda r: r["quality"])
    return next(r for r in front if r["quality"] >= best["quality"] - 2 * best["quality_sd"])


def _volumes(rows):
    values, kept = [], []
    for row in (r for r in rows if r["state"] == "proxied"):
        if row["feasible"]:
            kept.append((row["latency_ms"] / 1000, row["quality"]))
        area, floor = 0.0, 0.0
        for x, y in sorted(kept):
            if y > floor:
                area, floor = area + (BUDGET_MS / 1000 - x) * (y - floor), y
        values.append(area)
    return values


def _part(role, name, ms, source):
    return {
        "role": role,
        "name": name,
        "ms": ms,
        "source": source,
        "low_ms": ms,
        "high_ms": ms,
        "basis": "published",
    }


def _record(folder, rows, chosen):
    count = {s: sum(r["state"] == s for r in rows) for s in ("proxied", "infeasible", "duplicate")}
    reference = {k: v for k, v in rows[0].items() if not k.startswith("choice.") and k in COLUMNS}
    step_ms = 274.0
    return {
        "schema": 1,
        "name": folder.name,
        "space": "snapgen_unet",
        "space_path": None,
        "space_hash": "0123abcd4567",
        "space_summary": "UNets around SnapGen",
        "space_size": 10_077_696,
        "resolution_px": 1024,
        "target": "iphone-16-pro-max--coreml--fp16",
        "target_alias": "iphone",
        "budget": {
            "text": "1.4s@iphone",
            "ms": BUDGET_MS,
            "device": "iphone-16-pro-max--coreml--fp16",
            "per_step": False,
            "confidence": CONFIDENCE,
            "step_budget_ms": (BUDGET_MS - FIXED_MS) / CALLS,
        },
        "pipeline": {
            "steps": 4,
            "guidance": False,
            "calls": CALLS,
            "fixed_ms": FIXED_MS,
            "fixed_low_ms": FIXED_MS,
            "fixed_high_ms": FIXED_MS,
            "text_encoders": ["text encoders"],
            "decoder": "SnapGen decoder",
            "source": "SnapGen, arXiv 2412.09619",
            "parts": [
                _part("text_encoders", "text encoders", 6.3, "SnapFusion, arXiv 2306.00980"),
                _part("decoder", "SnapGen decoder", 119.0, "SnapGen, arXiv 2412.09619"),
            ],
        },
        "trials": {
            "asked": len(rows),
            "proxied": count["proxied"],
            "infeasible": count["infeasible"],
            "duplicates": count["duplicate"],
            "failed": 0,
        },
        "infeasible": {
            "share_of_space": 0.623,
            "sampled": 20_000,
            "reasons": {"latency bound over the budget": count["infeasible"]},
        },
        "wall_s": 402.7,
        "seed": 0,
        "jobs": 2,
        "command": "nas search --space snapgen_unet --budget 1.4s@iphone --trials 24",
        "teacher": "embedded",
        "provenance": {
            "nas": "0.1.0",
            "commit": "0123456789ab",
            "date": "2026-01-02T03:04:05+00:00",
            "python": "3.11.9",
            "platform": "Linux",
            "processor": "a CPU",
            "libraries": {"torch": "2.13.0", "numpy": "2.4.0"},
        },
        "proxy": {
            "steps": 60,
            "batch": 32,
            "learning_rate": 0.002,
            "seeds": [0, 1],
            "cannot_see": [
                "differences below two spreads",
                "whether a caption's words are bound to the right object: 60 steps do not teach it",
            ],
        },
        "warnings": ["3 of 9 networks are more than 2 times outside the fitted range"],
        "predictor": {
            "target": "iphone-16-pro-max--coreml--fp16",
            "rows": 17,
            "networks": 11,
            "blocks": 0,
            "held_out": {
                "method": "each network in turn",
                "rows": 17,
                "mape": 0.172,
                "within_5": 0.24,
                "within_10": 0.41,
                "spearman": 0.93,
                "kendall": 0.81,
                "worst": {"subject": "sd15-unet", "chip": "A17 Pro", "error": -0.43},
                "coverage": {
                    "0.8": {"nominal": 0.8, "measured": 0.824, "rows": 17},
                    "upper 0.8": {"nominal": 0.8, "measured": 0.765, "rows": 17},
                },
            },
            "never_seen": ["lookup", "depthwise"],
            "fitted_range_ms": [193.0, 1720.0],
            "ridge": 0.3,
            "block_scale": None,
            "chips": {"A17 Pro": 1.21, "A18 Pro": 1.0},
            "interval": {"method": "Student-t with 10 degrees of freedom", "networks": 11, "sd": 0.11},
            "excluded": 3,
            "sessions": 8,
            "noise_floor": None,
        },
        "references": [
            {
                **reference,
                "choices": SNAPGEN,
                "name": "snapgen",
                "title": "SnapGen-shaped UNet",
                "published_step_ms": step_ms,
                "published_ms": FIXED_MS + CALLS * step_ms,
                "published_params": 383_670_276,
                "published_source": "SnapGen++, arXiv 2601.08303",
            }
        ],
        "hypervolume": {
            "reference_point": {"latency_ms": BUDGET_MS, "quality": 0.0},
            "unit": "s·dB",
            "values": _volumes(rows),
        },
        "edges": [{"choice": "width_0", "value": chosen["choice.width_0"], "at": "high"}],
        "recommended": {
            "key": chosen["key"],
            "why": "the fastest whose quality ties with the best on the front",
        },
        "fidelity": {
            "candidates": 12,
            "teacher_digest": hashlib.sha256(b"teacher").hexdigest(),
            "kendall": {"short score": 0.64, "params": 0.42, "macs": 0.45},
            "note": "12 diverse candidates, scored against a run of the same loss ten times longer.",
        },
        "sources": ["SnapGen, arXiv 2412.09619", "SnapGen++, arXiv 2601.08303 v2"],
        "finished": True,
        "next": f"nas train {folder.name}#{chosen['key']}",
    }


def _since(rows):
    """What later versions added to study.json."""
    shares = np.random.default_rng(1).dirichlet(np.ones(len(CHOICES)), 2)
    importance = {
        name: {c: {"share": float(s), "chance": 0.05} for c, s in zip(CHOICES, shares[i], strict=True)}
        for i, name in enumerate(("quality", "latency"))
    }
    first = {"text": "1.4s@iphone", "ms": BUDGET_MS, "device": "iphone-16-pro-max--coreml--fp16", "per_step": False}
    second = {"text": "0.9s@galaxy-s24", "ms": 900.0, "device": "galaxy-s24--tflite--fp16", "per_step": False}
    return {
        "importance": importance | {"scored": len(rows), "priced": 500, "method": "PED-ANOVA (arXiv 2304.10255)"},
        "budgets": [{**first, "confidence": CONFIDENCE}, {**second, "confidence": CONFIDENCE}],
        "limits": {"max_params": 600_000_000, "max_memory_bytes": None, "max_weight_bytes": None},
        "rejected": {"1.4s@iphone": 0.623, "0.9s@galaxy-s24": 0.31, "--max-params 600M": 0.08},
        "rejected_alone": {"1.4s@iphone": 0.32, "0.9s@galaxy-s24": 0.015, "--max-params 600M": 0.0},
        "sampler": "front",
        "storage": "journal.log",
        "changed": ["budget 1.2s@iphone is now 1.4s@iphone"],
        "reuse": {"available": 31, "used": 12, "seconds_saved": 90.0},
    }


def edited(study, tmp_path, name, change):
    """A copy of the study with one file changed."""
    folder = tmp_path / "study"
    folder.mkdir()
    for path in study.iterdir():
        if path.suffix in (".json", ".csv"):
            (folder / path.name).write_text(change(path.read_text()) if path.name == name else path.read_text())
    return folder
