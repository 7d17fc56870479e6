import itertools

import numpy as np
import pytest

from nas.errors import NasError
from nas.pareto import front, hypervolume, hypervolumes, knee, non_dominated


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def brute_nondominated(points):
    return [not any(dominates(other, point) for other in points) for point in points]


def brute_hypervolume(points, reference):
    """Counts unit cells of the integer grid that some point dominates."""
    cells = itertools.product(range(int(reference[0])), range(int(reference[1])))
    return sum(any(p[0] <= x and p[1] <= y for p in points) for x, y in cells)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_nondominated_equals_brute_force(seed, objectives):
    # A coarse grid, so that ties and repeats occur.
    points = np.random.default_rng(seed).integers(0, 6, size=(25, objectives)).astype(float)
    assert non_dominated(points).tolist() == brute_nondominated(points.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_equals_counting_cells(seed):
    points = np.random.default_rng(seed).integers(0, 14, size=(9, 2)).astype(float)
    assert hypervolume(points, (10, 10)) == brute_hypervolume(points.tolist(), (10, 10))


def test_hypervolume_by_hand_and_outside_the_reference():
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 1.0]]), (4.0, 4.0)) == 3 * 1 + 2 * 2
    assert hypervolume(np.array([[4.0, 0.0], [0.0, 4.0], [9.0, 9.0]]), (4.0, 4.0)) == 0
    assert hypervolume(np.empty((0, 2)), (4.0, 4.0)) == 0
    assert hypervolume([], (4.0, 4.0)) == 0


def test_hypervolumes_is_the_volume_of_each_prefix():
    points = np.random.default_rng(3).normal(size=(12, 2))
    values = hypervolumes(points, (1.0, 1.0))
    assert values.tolist() == [hypervolume(points[: i + 1], (1.0, 1.0)) for i in range(12)]
    assert (np.diff(values) >= 0).all()
    assert values[-1] > values[0]


def test_front_is_sorted_and_keeps_equal_points():
    points = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [2.5, 2.5]])
    assert front(points).tolist() == [1, 2, 3, 0]


def test_knee_is_farthest_below_the_line_between_the_ends():
    # Scaled: (0,1) (.1,.2) (.6,.1) (1,0): depths 0, .7, .3, 0. The dominated point would be deepest were it counted.
    points = np.array([[110.0, 5.0], [100.0, 13.0], [106.0, 4.0], [101.0, 5.0], [110.0, 3.0]])
    assert knee(points) == 3


def test_knee_does_not_depend_on_units():
    points = np.array([[100.0, 13.0], [101.0, 5.0], [106.0, 4.0], [110.0, 3.0]])
    assert knee(points * [1e-3, 1e6]) == knee(points) == 1


def test_a_front_without_a_bend_gives_its_best_second_objective():
    assert knee(np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])) == 2
    assert knee(np.array([[0.0, 1.0], [0.9, 0.9], [1.0, 0.0]])) == 2
    assert knee(np.array([[5.0, 5.0]])) == 0


@pytest.mark.parametrize("call", [non_dominated, front, knee])
def test_a_point_that_is_no_number_is_refused(call):
    with pytest.raises(NasError, match="finite"):
        call(np.array([[1.0, float("nan")], [1.0, 2.0]]))


def test_wrong_shapes_are_refused():
    with pytest.raises(NasError, match="two objectives, got 3"):
        hypervolume(np.zeros((2, 3)), (1.0, 1.0))
    with pytest.raises(NasError, match=r"\[n, objectives\]"):
        non_dominated(np.zeros(3))
    with pytest.raises(NasError, match="at least 1"):
        knee(np.empty((0, 2)))
