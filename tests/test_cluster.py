"""Ray as an executor: tasks on two nodes, one of which is killed; and a search over them."""

from __future__ import annotations

import sys
import time
from concurrent.futures import BrokenExecutor

import pytest

from nas import cluster
from nas.errors import DIVERGED, OUT_OF_MEMORY, NasError, UntrainableError, UsageError
from nas.proxies import settings_of
from nas.record import read_study
from nas.search import SearchSettings, run_search
from tests.toy_space import write_space

SMALL = {"steps": 1, "batch": 2, "held_rows": 8}


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A cluster with a head that runs nothing and two nodes of one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.chdir(tmp_path)
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    utils = pytest.importorskip("ray.cluster_utils")
    # Nodes cannot import the tests; they import nas.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    head = utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False},
    )
    two = [head.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    head.wait_for_nodes()
    yield head, two
    ray.shutdown()
    head.shutdown()


def where(seconds):
    """The node that it ran on, after a while."""
    import ray

    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def diverging():
    raise UntrainableError("it diverged", DIVERGED)


def mistaken():
    raise ZeroDivisionError("a mistake of ours")


@pytest.mark.slow
def test_runs_go_to_all_nodes_and_those_of_a_killed_node_are_run_again_elsewhere(nodes):
    head, (first, second) = nodes
    with cluster.executor(cluster.Cluster(address=head.address)) as tasks:
        futures = [tasks.submit(where, 1.0) for _ in range(4)]
        assert {future.result(timeout=120) for future in futures} == {first.node_id, second.node_id}
        futures = [tasks.submit(where, 3.0) for _ in range(2)]
        time.sleep(1.0)
        head.remove_node(first, allow_graceful=False)
        assert [future.result(timeout=240) for future in futures] == [second.node_id] * 2
        for function, kind in ((diverging, UntrainableError), (mistaken, ZeroDivisionError)):
            with pytest.raises(kind):
                tasks.submit(function).result(timeout=120)


@pytest.mark.slow
def test_a_search_over_two_nodes_outlives_one_of_them(nodes, tmp_path):
    head, (first, _) = nodes
    killed = []

    def progress(stage, done, total, note):
        if note.startswith("scoring") and done >= 2 and not killed:
            killed.append(note)
            head.remove_node(first, allow_graceful=False)

    settings = SearchSettings(
        space=str(write_space(tmp_path)),
        budgets=("9ms/step@iphone",),
        trials=6,
        jobs=2,
        proxy=settings_of("params", **SMALL),
        ray=head.address,
        out=tmp_path / "study",
        reuse=False,
    )
    found = run_search(settings, progress)
    record = read_study(found.folder)
    assert killed
    assert record["trials"]["proxied"] == 6
    assert record["trials"]["failed"] == 0
    assert len(found.front) >= 1


def test_a_run_that_asks_for_nothing_is_refused():
    with pytest.raises(UsageError, match="got --cpus-per-proxy 0 and --gpus-per-proxy 0"):
        cluster.Cluster(address="auto", cpus=0.0)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(NasError, match=r"the Ray cluster 127\.0\.0\.1:1 cannot be reached") as caught:
        cluster.executor(cluster.Cluster(address="127.0.0.1:1"))
    assert "\n" not in caught.value.message


def test_an_error_of_ray_itself_is_the_candidates_only_where_memory_ran_out():
    class OutOfMemoryError(Exception):
        """Of the name that Ray gives it."""

    found = cluster._translated(OutOfMemoryError("Task was killed due to the node running low on memory\nmore"))
    assert isinstance(found, UntrainableError)
    assert found.cause == OUT_OF_MEMORY
    assert isinstance(cluster._translated(RuntimeError("the node died")), BrokenExecutor)
