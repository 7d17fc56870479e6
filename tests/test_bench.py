"""The bench: small copies of candidates, and how a student is judged and watched."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from proxy_case import SETTINGS, made_rows
from tiny_lesson import candidate
from torch import Tensor, nn

from nas import bench
from nas.bench import Bench, Point, ProxySettings, Stopped, distilled, fidelity_of, learning_rate, small_copy, student
from nas.diffusion import Conditioning, FlowDenoiser
from nas.errors import DIVERGED, NasError, UntrainableError
from nas.targets import Rows


class Stub(FlowDenoiser):
    """Answers a fixed function of the rows: the teacher's velocity with a known error."""

    def __init__(self, rows: Rows, answer: str, preconditioner: object) -> None:
        super().__init__(nn.Identity(), preconditioner)  # type: ignore[arg-type]
        self.rows, self.answer = rows, answer

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        count = len(x) // 2
        found = [next(i for i in range(len(self.rows)) if torch.equal(self.rows.x[i], row)) for row in x[:count]]
        conditional, null = self.rows.velocity[found], self.rows.null_velocity[found]
        if self.answer == "skip":
            return self.preconditioner.skip(x, t)
        if self.answer == "deaf":
            return torch.cat([null, null])
        skip = self.preconditioner.skip(x, t)[:count]
        off = 0.1 * (conditional - skip)
        return torch.cat([conditional - off, null - off])


def test_scores_have_their_closed_form(teacher: str) -> None:
    rows, preconditioner = made_rows(6), bench.embedded_lesson(teacher, "shapes")[0].preconditioner
    skip = fidelity_of(Stub(rows, "skip", preconditioner), rows)
    assert skip.quality_db == pytest.approx(0, abs=1e-5)
    assert skip.text_error == pytest.approx(1, abs=1e-6)
    near = fidelity_of(Stub(rows, "near", preconditioner), rows)
    assert near.quality_db == pytest.approx(20, abs=1e-4)  # a tenth of the residual is left
    assert near.text_error == pytest.approx(0, abs=1e-6)
    assert near.loss == pytest.approx(0.01 * skip.loss, rel=1e-4)
    deaf = fidelity_of(Stub(rows, "deaf", preconditioner), rows)
    assert deaf.text_error == pytest.approx(1, abs=1e-6)
    assert deaf.text_db == pytest.approx(0, abs=1e-5)


def test_small_copy_keeps_the_structure(teacher: str) -> None:
    loaded = bench.embedded_lesson(teacher, "shapes")[0]
    chosen = candidate(depth_2=2, conv_1="separable-2")
    small = small_copy(chosen, loaded, ProxySettings())
    from nas.families import network

    full = network(chosen)
    assert [(b.name, b.kind, b.skip) for b in small.blocks] == [(b.name, b.kind, b.skip) for b in full.blocks]
    by_name = {b.name: b for b in small.blocks}
    for block in full.blocks:
        if block.kind == "transformer":
            assert block.setting("channels") == 16 * by_name[block.name].setting("channels")  # type: ignore[operator]
            assert block.setting("kv_heads") == by_name[block.name].setting("kv_heads")
            assert block.setting("depth") == by_name[block.name].setting("depth")
    assert (small.input.channels, small.input.height, small.input.text_width) == (48, 8, 8)


def test_a_student_starts_from_its_seed(teacher: str) -> None:
    loaded = bench.embedded_lesson(teacher, "shapes")[0]
    spec = small_copy(candidate(), loaded, SETTINGS)
    one, same, other = (student(spec, loaded, 4, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert student(spec, loaded, 4, 0).preconditioner == loaded.preconditioner


def test_widths_that_do_not_divide_are_named(teacher: str) -> None:
    loaded = bench.embedded_lesson(teacher, "shapes")[0]
    with pytest.raises(NasError, match="head width 64 cannot be divided by the proxy's 7"):
        small_copy(candidate(), loaded, replace(SETTINGS, width_divisor=7))
    with pytest.raises(NasError, match="norm groups"):
        small_copy(candidate(), loaded, replace(SETTINGS, width_divisor=16, norm_groups=16))


def test_a_teacher_without_text_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.small, "_load_teacher", lambda name, device: object())
    with pytest.raises(NasError, match="has no text encoder"):
        bench.embedded_lesson("some/unet", "shapes")


def test_students_are_told_the_layout_that_training_gives_them(teacher: str) -> None:
    made = Bench(teacher, SETTINGS)
    batch = made.data.batch(0)
    assert batch.text.layout is not None
    torch.testing.assert_close(batch.text.layout, made.embedded.layout(batch.text.tokens))
    assert batch.null_text is not None
    assert batch.null_text.layout is not None


def test_a_bench_travels_without_what_it_has_loaded(teacher: str) -> None:
    made = Bench(teacher, SETTINGS)
    assert len(made.held) == SETTINGS.held_rows
    assert len(pickle.dumps(made)) < 2000
    assert pickle.loads(pickle.dumps(made)) == made


def test_everything_goes_to_the_device_and_starts_alike_there(teacher: str) -> None:
    made = Bench(teacher, SETTINGS)
    made.prepare()
    there = Bench(teacher, SETTINGS, "meta")  # a device that every machine has
    assert pickle.loads(pickle.dumps(there)).device == "meta"
    assert there.digest == made.digest
    batch = there.data.batch(0)
    assert batch.teacher is not None
    tensors = [*batch.point(), batch.teacher.velocity]
    tensors += [part for text in (batch.text, batch.null_text) for _, part in text.parts()]
    assert {each.device.type for each in tensors} == {"meta"}
    assert len(tensors) == 7  # tokens and layout, of both
    fresh = there.student(there.spec(candidate()), 0)
    assert {each.device.type for each in fresh.parameters()} == {"meta"}
    assert made.data.batch(0).point()[0].device.type == "cpu"


def test_narrow_networks_get_larger_steps_by_the_width_rule(teacher: str) -> None:
    made = Bench(teacher, SETTINGS)
    narrow, wide = (made.spec(candidate(width_2=width)) for width in (512, 1024))
    assert learning_rate(narrow, SETTINGS) == learning_rate(wide, SETTINGS) == SETTINGS.lr
    scaled = replace(SETTINGS, lr_rule="width")
    assert learning_rate(narrow, scaled) > learning_rate(wide, scaled)


def test_a_run_is_watched_on_its_way(teacher: str) -> None:
    made = Bench(teacher, replace(SETTINGS, steps=8))
    _, found, curve = distilled(made.student(made.spec(candidate()), 0), made, judged_at=(4, 8))
    assert [point.step for point in curve] == [4, 8]
    assert curve[-1].quality_db == pytest.approx(found.quality_db)
    assert curve[-1].text_db == pytest.approx(found.text_db)
    assert 0 < curve[0].seconds < curve[1].seconds
    # Watching changes nothing.
    _, again, bare = distilled(made.student(made.spec(candidate()), 0), made)
    assert again == found
    assert [point.step for point in bare] == [8]
    assert bare[0].quality_db is None


def test_a_run_is_stopped_where_a_rule_says_so(teacher: str) -> None:
    made, seen = Bench(teacher, replace(SETTINGS, steps=8)), []

    def stop(points: Sequence[Point]) -> str | None:
        seen.append([point.step for point in points])
        return "hopeless" if len(points) == 2 else None

    with pytest.raises(Stopped, match="hopeless") as caught:
        distilled(made.student(made.spec(candidate()), 0), made, stop=stop)
    assert seen == [[2], [2, 4]]
    assert [point.step for point in caught.value.curve] == [2, 4]
    assert pickle.loads(pickle.dumps(caught.value)).curve == caught.value.curve


def test_a_student_that_learns_nothing_is_no_score(teacher: str) -> None:
    made = Bench(teacher, replace(SETTINGS, lr=30.0, steps=6))
    with pytest.raises(UntrainableError, match=r"no better than before the first|not finite") as caught:
        distilled(made.student(made.spec(candidate()), 0), made)
    assert caught.value.cause == DIVERGED


def test_no_steps_judge_the_weights_as_they_are(teacher: str) -> None:
    made = Bench(teacher, replace(SETTINGS, steps=0))
    fresh = made.student(made.spec(candidate()), 0)
    before = [each.clone() for each in fresh.parameters()]
    trained, found, curve = distilled(fresh, made)
    assert curve == ()
    assert found == made.judge(made.student(made.spec(candidate()), 0))
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_settings_without_sense_are_refused() -> None:
    for changes in ({"steps": -1}, {"batch": 0}, {"seeds": ()}):
        with pytest.raises(NasError, match="a proxy needs"):
            ProxySettings(**changes)
