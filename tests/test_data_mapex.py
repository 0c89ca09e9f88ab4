"""Reading shards: map-style and streaming give the samples; ranks and workers share them; a resume changes nothing."""

import os
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from interpreters import run_python
from shard_samples import SCHEMA, assert_same_sample, items, make_sample, read


pytest.importorskip("datasets", reason="shards need the extra `data`")

from modeling_mapex import writing_mapex
from modeling_mapex.data_mapex import MixedShardStream, load_shards, read_schema, split_of_place, stream_shards
from modeling_mapex.writing_mapex import write_shards


COUNT = 53  # divides evenly by nothing below


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A function of the number of shards."""
    made = {}
    total = sum(
        len(value) for item in items(COUNT) for value in SCHEMA.encode(read(item)).values() if isinstance(value, bytes)
    )

    def make(number):
        if number not in made:
            folder = tmp_path_factory.mktemp(f"shards{number}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 10_000)
                for size in range(total // number, 0, -500):  # samples differ in size: find what gives so many
                    options = {"shard_bytes": size, "overwrite": True, "progress": False}
                    if len(write_shards(items(COUNT), read, SCHEMA, folder, **options).shards) == number:
                        break
            made[number] = folder
        return made[number]

    return make


def ids(samples) -> list[str]:
    return [sample["id"] for sample in samples]


ALL = [f"chip-{index}" for index in range(COUNT)]


def test_map_style(shards, tmp_path):
    dataset = load_shards(shards(5), cache_dir=tmp_path)
    assert len(dataset) == COUNT
    for index in (0, 7, COUNT - 1):
        assert_same_sample(dataset[index], make_sample(index))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=ids)
    assert sorted(chain.from_iterable(loader)) == sorted(ALL)


def test_streaming(shards):
    stream = stream_shards(shards(5))
    for index, sample in enumerate(stream):
        assert_same_sample(sample, make_sample(index))
    assert index == COUNT - 1


def test_chosen_modalities_and_labels(shards, tmp_path):
    options = {"modalities": ["dem"], "labels": ["crop"]}
    for sample in (
        load_shards(shards(5), cache_dir=tmp_path, **options)[2],
        next(iter(stream_shards(shards(5), **options))),
    ):
        assert list(sample["images"]) == ["dem"] and list(sample["labels"]) == ["crop"]
    with pytest.raises(ValueError, match=r"no modalities \['s3'\]"):
        stream_shards(shards(5), modalities=["s3"])


def test_shuffled(shards):
    stream = stream_shards(shards(5), seed=3, window=16)
    first, again = ids(stream), ids(stream)
    assert first == again and first != ALL and sorted(first) == sorted(ALL)
    stream.set_epoch(1)
    second = ids(stream)
    assert second != first and sorted(second) == sorted(ALL)
    assert ids(stream_shards(shards(5), seed=4, window=16)) != first
    one_shard = stream_shards(shards(1), seed=3, window=16)
    orders = []
    for epoch in range(2):
        one_shard.set_epoch(epoch)
        orders.append(ids(one_shard))
    assert orders[0] != orders[1], "with one shard only the windows can differ"


def test_order_of_shards_is_of_seed_and_epoch(shards):
    """Windows of one sample: what remains is the order of the shards."""

    def order(seed: int | None, epoch: int) -> tuple:
        stream = stream_shards(shards(5), seed=seed, window=1)
        stream.set_epoch(epoch)
        return tuple(ids(stream))

    assert all(order(None, epoch) == tuple(ALL) for epoch in range(3)), "as they were written"
    orders = {(seed, epoch): order(seed, epoch) for seed in (3, 4) for epoch in range(5)}
    assert len(set(orders.values())) > 7
    changes = {seed: [orders[seed, epoch + 1] != orders[seed, epoch] for epoch in range(4)] for seed in (3, 4)}
    assert sum(changes[3]) >= 3 and sum(changes[4]) >= 3


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("stop", [1, 16, 17, 37, COUNT - 1])
def test_resume(shards, seed, epoch, stop):
    stream = stream_shards(shards(5), seed=seed, window=16)
    stream.set_epoch(epoch)
    whole = ids(stream)
    running = iter(stream)
    seen = [next(running)["id"] for _ in range(stop)]
    state = stream.state_dict()
    resumed = stream_shards(shards(5), seed=seed, window=16)
    resumed.load_state_dict(state)
    assert seen + ids(resumed) == whole
    for later in (epoch + 1, epoch + 2):
        for each in (stream, resumed):
            each.set_epoch(later)
        assert ids(resumed) == ids(stream) and sorted(ids(resumed)) == sorted(ALL)


@pytest.mark.parametrize("number", [3, 4, 8])
def test_ranks_are_disjoint_and_complete(shards, number):
    """Whether or not the number of shards divides by that of the processes."""
    parts = [ids(stream_shards(shards(number), seed=1, window=8, rank=rank, world_size=2)) for rank in range(2)]
    assert all(parts) and sorted(parts[0] + parts[1]) == sorted(ALL)


@pytest.mark.parametrize("number", [4, 7])
@pytest.mark.parametrize("seed", [None, 5])
def test_two_ranks_of_two_workers_resume_in_mid_epoch(shards, number, seed):
    """Samples are disjoint and complete, and after a resume the rest of the epoch is what it would have been."""
    stateful = pytest.importorskip(
        "torchdata.stateful_dataloader", reason="resuming with workers needs the extra `train`"
    )

    def loader(rank):
        stream = stream_shards(shards(number), seed=seed, window=8, rank=rank, world_size=2)
        stream.set_epoch(1)
        return stateful.StatefulDataLoader(stream, batch_size=4, num_workers=2, collate_fn=ids)

    seen = []
    for rank in range(2):
        whole = list(loader(rank))
        seen += chain.from_iterable(whole)
        stopped = loader(rank)
        running = iter(stopped)
        begun = [next(running) for _ in range(3)]
        state = stopped.state_dict()
        del running
        resumed = loader(rank)
        resumed.load_state_dict(state)
        assert begun + list(resumed) == whole
    assert sorted(seen) == sorted(ALL)


SHARES = {"train": 0.7, "test": 0.3}


def mixture(shards, **options) -> MixedShardStream:
    """Five shards of 53 samples, and one shard of 13 of them, which is over sooner."""
    few = stream_shards(shards(1), seed=3, window=8, places=is_early)
    streams = {"many": stream_shards(shards(5), seed=3, window=8), "few": few}
    return MixedShardStream(streams, **{"weights": {"many": 3.0, "few": 1.0}, "seed": 5, **options})


def is_early(place: str) -> bool:
    return place in ("place-0", "place-1", "place-10")


def drawn(samples) -> list[tuple]:
    return [(sample["epoch"], sample["id"]) for sample in samples]


def test_mixture(shards):
    """Shares follow the weights; each source goes through all of its samples before it begins again."""
    samples = drawn(islice(mixture(shards), 400))
    early = {f"chip-{index}" for index in (*range(10), *range(50, 53))}
    per_epoch = Counter(epoch for epoch, _ in samples)
    assert 400 // len(early) * 0.15 < len(per_epoch) < 400 // len(early) * 0.35  # a quarter of the samples are of `few`
    seen = Counter(samples)
    # What both sources hold is drawn twice in an epoch at most, the rest, of `many` alone, once.
    assert all(count <= (2 if name in early else 1) for (_, name), count in seen.items())
    assert all(seen[0, name] == 2 for name in early) and all(seen[0, name] >= 1 for name in ALL)
    assert [name for epoch, name in samples if epoch == 1] != [name for epoch, name in samples if epoch == 0]
    assert drawn(islice(mixture(shards, seed=6), 40)) != samples[:40]


@pytest.mark.parametrize("stop", [0, 1, 12, 57, 60, 130])
def test_mixture_resumes(shards, stop):
    """At the very next sample, also after a source has begun anew, and through epochs that follow."""
    expected = drawn(islice(mixture(shards), 300))
    first = mixture(shards)
    before = drawn(islice(first, stop)) if stop else []
    second = mixture(shards)
    second.load_state_dict(first.state_dict())
    assert before + drawn(islice(second, 300 - stop)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_mixture_resumes_with_workers(shards, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(mixture(shards), batch_size=4, num_workers=workers, collate_fn=drawn)

    expected = list(islice(loader(), 40))
    first = loader()
    before = list(islice(first, 17))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert before + list(islice(second, 23)) == expected
    if workers:  # the second one has no shard of `few`; the first makes up for it
        share = sum(name in [f"chip-{index}" for index in range(10)] for batch in expected for _, name in batch) / 160
        assert 0.2 < share < 0.6


@pytest.mark.parametrize("rank", range(3))
def test_mixture_goes_on_where_a_reader_has_nothing_in_an_epoch(tmp_path, monkeypatch, rank):
    """Of three shards the last holds a single sample, of a place that is left out: each epoch another reader's."""
    monkeypatch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 1000)
    size = sum(len(value) for value in SCHEMA.encode(read(items(1)[0])).values() if isinstance(value, bytes))
    few = items(11)
    assert len(write_shards(few, read, SCHEMA, tmp_path, shard_bytes=4 * size, progress=False).shards) == 3
    options = {"seed": 3, "window": 4, "rank": rank, "world_size": 3}
    stream = stream_shards(tmp_path, places=lambda place: place != "place-2", **options)
    seen = drawn(islice(MixedShardStream({"a": stream}), 60))
    assert {name for _, name in seen} == {f"chip-{index}" for index in range(10)}
    epochs = sorted({epoch for epoch, _ in seen})
    assert epochs != list(range(epochs[-1] + 1)), "some epoch held nothing"


def test_mixture_refuses(shards):
    stream = stream_shards(shards(1))
    with pytest.raises(ValueError, match="do not belong"):
        MixedShardStream({"a": stream}, {"b": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        MixedShardStream({"a": stream}, {"a": 0.0})
    empty = stream_shards(shards(1), places=lambda place: False)
    with pytest.raises(ValueError, match="`a` has no samples"):
        next(iter(MixedShardStream({"a": empty})))
    with pytest.raises(ValueError, match="position is of a mixture"):
        MixedShardStream({"a": stream}).load_state_dict(MixedShardStream({"b": stream}).state_dict())


def is_train(place: str) -> bool:
    return split_of_place(place, SHARES) == "train"


def test_split_by_place(shards, tmp_path):
    """Disjoint, complete, whole places, the same map-style and streaming; and a resume is exact."""
    train = ids(load_shards(shards(5), places=is_train, cache_dir=tmp_path))
    test = ids(load_shards(shards(5), places=lambda place: not is_train(place), cache_dir=tmp_path))
    assert train and test and sorted(train + test) == sorted(ALL)
    assert not {make_sample(ALL.index(chip)).place for chip in train} & {
        make_sample(ALL.index(chip)).place for chip in test
    }
    stream = stream_shards(shards(5), places=is_train, seed=1, window=8)
    whole = ids(stream)
    assert sorted(whole) == sorted(train)
    for stop in (3, 8, 13):
        running = iter(stream)
        seen = [next(running)["id"] for _ in range(stop)]
        resumed = stream_shards(shards(5), places=is_train, seed=1, window=8)
        resumed.load_state_dict(stream.state_dict())
        assert seen + ids(resumed) == whole


def test_shares_of_places():
    drawn = [split_of_place(str(index), SHARES) for index in range(2000)]
    assert abs(drawn.count("train") / 2000 - 0.7) < 0.05
    assert drawn != [split_of_place(str(index), SHARES, seed=1) for index in range(2000)]
    assert {split_of_place(str(index), {"all": 1.0, "none": 0.0}) for index in range(50)} == {"all"}
    with pytest.raises(ValueError, match="sum to 1"):
        split_of_place("a", {"train": 0.7})


def test_from_the_hub(shards, tmp_path):
    """By the id of a data set, through the real client and HTTP: map-style and streaming, whole and a few columns."""
    script = """
        import os
        from modeling_mapex.data_mapex import load_shards, stream_shards

        print([sample["id"] for sample in stream_shards("me/chips", seed=3, window=16)])
        print([sample["id"] for sample in load_shards("me/chips", cache_dir="cache")])
        stream = stream_shards("me/chips", modalities=["dem"], labels=[], revision="v1.0")
        print([int(sample["images"]["dem"].sum()) for sample in stream])
        for source, split in (("me/chips", "val"), ("me/other", "train"), ("me/part", "train")):
            try:
                stream_shards(source, split)
            except FileNotFoundError as error:
                print(error)
        os._exit(0)  # past this line there is nothing to test; arrow's threads may outlive the interpreter
    """
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.put("me/chips", {file.name: file.read_bytes() for file in shards(5).iterdir()}, kind="dataset")
        hub.repository("me/chips", "dataset").tags["v1.0"] = commit
        hub.put("me/part", {file.name: file.read_bytes() for file in list(shards(5).iterdir())[1:]}, kind="dataset")
        output = run_python(script, tmp_path, {**hub.environment(tmp_path / "home"), "PYTHONUNBUFFERED": "1"})
    shuffled, mapped, elevations, no_split, no_repo, not_whole = output.splitlines()
    assert shuffled == str(ids(stream_shards(shards(5), seed=3, window=16))) and mapped == str(ALL)
    assert elevations == str([int(make_sample(index).images["dem"].pixels.sum()) for index in range(COUNT)])
    assert no_split == "No shards of the split `val` in the data set `me/chips` on the Hub."
    assert "me/other" in no_repo
    assert not_whole == "The split `train` in datasets/me/part on the Hub has 4 of its 5 shards."


def test_memory_stays_flat_as_a_shard_grows(tmp_path):
    """A shard of 246 MB is written and streamed with hardly more memory than one of 31 MB, each in a fresh process."""
    script = Path(__file__).parent / "stream_peak_memory.py"
    peaks = {}
    for count in (256, 2048):
        result = subprocess.run(
            [sys.executable, str(script), str(tmp_path / str(count)), str(count)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        size, peaks[count] = map(float, result.stdout.split())
    assert size > 200, "the larger shard must be larger than what is allowed"
    assert peaks[2048] - peaks[256] < 100, peaks


def test_hub_out_of_reach():
    with pytest.raises(ConnectionError, match=r"There is no folder org/chips. Cannot reach the Hub for the data set"):
        read_schema("org/chips")
