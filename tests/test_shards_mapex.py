"""Shards: what goes in comes out bit for bit; interruptions, failures and other versions lose nothing in silence."""

import json
import os

import numpy as np
import pytest
from shard_samples import SCHEMA, SIZE, assert_same_sample, items, make_sample, read


pa = pytest.importorskip("pyarrow", reason="shards need the extra `data`")
pq = pytest.importorskip("pyarrow.parquet", reason="shards need the extra `data`")
pytest.importorskip("datasets", reason="shards need the extra `data`")

from modeling_mapex import writing_mapex  # noqa: E402
from modeling_mapex.data_mapex import read_schema  # noqa: E402
from modeling_mapex.inspection_mapex import describe_shards, validate_shards  # noqa: E402
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema, mask_names, shard_files  # noqa: E402
from modeling_mapex.writing_mapex import Item, write_shards  # noqa: E402


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of about two samples, so that a few samples make several groups and shards."""
    monkeypatch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 15_000)


def write(output, count=11, **options):
    return write_shards(items(count), read, SCHEMA, output, **{"shard_bytes": 30_000, "progress": False, **options})


def decoded(output, split="train"):
    return [
        SCHEMA.decode(row) for path in shard_files(output, split) for row in pq.ParquetFile(path).read().to_pylist()
    ]


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


class TestSchema:
    @pytest.mark.parametrize("index", range(4))
    def test_round_trip(self, index):
        sample = make_sample(index)
        assert_same_sample(SCHEMA.decode(SCHEMA.encode(sample)), sample)

    def test_big_endian_and_strided_arrays(self):
        pixels = np.arange(2 * SIZE * SIZE, dtype=">f4").reshape(SIZE, SIZE, 2).transpose(2, 0, 1)
        row = SCHEMA.encode(Sample("a", "b", {"s1": Layer(pixels)}))
        assert np.array_equal(SCHEMA.decode(row)["images"]["s1"], pixels)

    def test_metadata_describes_the_rows(self):
        assert ShardSchema.from_arrow(SCHEMA.to_arrow()) == SCHEMA

    def test_unknown_version(self):
        schema = SCHEMA.to_arrow()
        description = json.loads(schema.metadata[b"mapex"])
        newer = schema.with_metadata({b"mapex": json.dumps({**description, "schema_version": 2})})
        with pytest.raises(ValueError, match=r"x.parquet is of shard schema version 2; this release reads version 1"):
            ShardSchema.from_arrow(newer, "x.parquet")
        with pytest.raises(ValueError, match="is no MAPEX shard"):
            ShardSchema.from_arrow(pa.schema([("a", pa.int8())]))

    def test_version_1_stays_readable(self):
        """The layout of the first release, written down: a later one must open it."""
        columns = [
            *(("id", pa.string()), ("place", pa.string()), ("s1", pa.large_binary())),
            *(("s1__shape", pa.list_(pa.int32())), ("s1__crs", pa.string())),
            *(("s1__transform", pa.list_(pa.float64())), ("s1__gsd", pa.float64()), ("crop", pa.int64())),
        ]
        metadata = (
            '{"labels": {"crop": {"kind": "class", "names": ["rye"]}}, "modalities": {"s1": {"bands": ["VV"], "dtype": '
            '"uint8", "gsd": 10.0, "unit": "uint8"}}, "schema_version": 1, "title": "old"}'
        )
        schema = ShardSchema.from_arrow(pa.schema(columns, metadata={b"mapex": metadata}))
        row = {"id": "a", "place": "b", "s1": bytes([1, 2]), "s1__shape": [1, 1, 2], "s1__crs": None}
        sample = schema.decode({**row, "s1__transform": None, "s1__gsd": 10.0, "crop": 0})
        assert sample["images"]["s1"].tolist() == [[[1, 2]]] and sample["labels"] == {"crop": 0}
        assert schema.to_arrow().equals(pa.schema(columns))

    @pytest.mark.parametrize(
        ("modalities", "labels", "message"),
        [
            ({}, {}, "at least one modality"),
            ({"a b": {}}, {}, "`a b` cannot name a column"),
            ({"a__b": {}}, {}, "`a__b` cannot name a column"),
            ({"id": {}}, {}, "`id` cannot name a column"),
            ({"s1": {"bands": ["VV"]}}, {}, r"lacks \['dtype', 'gsd', 'unit'\]"),
            ({"s1": {**SCHEMA.modalities["s1"], "units": "db"}}, {}, r"unknown keys \['units'\]"),
            (SCHEMA.modalities, {"s1": {"kind": "class", "names": []}}, "A label has the name of a modality"),
            (SCHEMA.modalities, {"x": {"kind": "clas"}}, "`x` is of kind 'clas'; possible are"),
            (SCHEMA.modalities, {"x": {"kind": "class"}}, r"`x` needs \['names'\]"),
        ],
    )
    def test_refuses(self, modalities, labels, message):
        with pytest.raises(ValueError, match=message):
            ShardSchema(modalities, labels)

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            ({}, {}, "has no modality at all"),
            ({"s3": Layer(np.zeros((1, 2, 2)))}, {}, r"holds \['s3'\], which the schema does not name"),
            ({"s1": Layer(np.zeros((2, 4, 4)))}, {}, "`s1` is of type float64, the schema says float32"),
            ({"s1": Layer(np.zeros((3, 4, 4), np.float32))}, {}, r"`s1` has the shape \(3, 4, 4\); its bands are"),
            ({"s1": Layer(np.zeros((2, 4, 0), np.float32))}, {}, "has the shape"),
            (None, {"crop": 3}, "`crop` is 3, but there are 3 classes"),
            (None, {"cover": [1]}, "`cover` must be 0 or 1 for each of 2 classes"),
            (None, {"flood": np.zeros((2, 2))}, "`flood` is float64"),
        ],
    )
    def test_refuses_samples_that_do_not_fit(self, images, labels, message):
        sample = Sample("a", "b", make_sample(0).images if images is None else images, labels)
        with pytest.raises(ValueError, match=message):
            SCHEMA.encode(sample)

    def test_select(self):
        chosen = SCHEMA.select(["s1"], [])
        assert list(chosen.modalities) == ["s1"] and chosen.labels == {}
        with pytest.raises(ValueError, match=r"no modalities \['s9'\]. Available"):
            SCHEMA.select(["s9"])
        with pytest.raises(TypeError, match="must be a list"):
            SCHEMA.select("s1")

    def test_mask_names(self):
        assert mask_names(SCHEMA.labels["flood"]) == {-1: "ignored", 0: "dry", 1: "wet"}
        assert mask_names({"names": ["a", "b"]}) == {0: "a", 1: "b"}


@pytest.mark.usefixtures("small_groups")
class TestWriting:
    def test_round_trip(self, tmp_path):
        report = write(tmp_path)
        assert (report.written, report.failures, report.exit_code) == (11, [], 0) and len(report.shards) > 2
        for index, sample in enumerate(decoded(tmp_path)):
            assert_same_sample(sample, make_sample(index))
        assert validate_shards(tmp_path) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in report.shards]
        assert pq.ParquetFile(report.shards[0]).num_row_groups > 1

    def test_number_of_workers_changes_nothing(self, tmp_path):
        write(tmp_path / "here")
        write(tmp_path / "there", workers=2)
        assert contents(tmp_path / "here") == contents(tmp_path / "there")

    def test_failures_are_reported_and_the_rest_is_written(self, tmp_path):
        some = items(8)
        some[2] = Item("chip-2", "chip-2.tif", "file is truncated")
        some[3] = Item("chip-1", "again.tif", 1)
        report = write_shards(some, read, SCHEMA, tmp_path, shard_bytes=20_000, progress=False)
        assert report.failures == [
            ("chip-2.tif", "file is truncated"),
            ("again.tif", "the id `chip-1` is taken by an earlier item"),
        ]
        assert (report.written, report.exit_code) == (6, 1)
        assert "left out: chip-2.tif: file is truncated" in report.summary()
        assert [sample["id"] for sample in decoded(tmp_path)] == [f"chip-{index}" for index in (0, 1, 4, 5, 6, 7)]

        # The file is mended: only the shards that left something out are read again.
        some[2], read_again = items(3)[2], []

        def counting(item):
            read_again.append(item.id)
            return read(item)

        report = write_shards(some, counting, SCHEMA, tmp_path, resume=True, progress=False)
        assert len(report.failures) == 1 and report.reused > 0 and len(read_again) < len(some)
        assert [sample["id"] for sample in decoded(tmp_path)] == [f"chip-{index}" for index in (0, 1, 2, 4, 5, 6, 7)]
        assert validate_shards(tmp_path) == []

    def test_all_that_follow_a_full_shard_fail(self, tmp_path):
        """No shard is begun for them that would hold nothing; mended, they are read into one."""
        full = pq.read_metadata(write(tmp_path / "first", shard_bytes=20_000).shards[0]).num_rows
        some = items(full + 3)
        broken = [item if item.payload < full else item._replace(payload="broken") for item in some]
        report = write_shards(broken, read, SCHEMA, tmp_path / "a", shard_bytes=20_000, progress=False)
        assert len(report.shards) == 1 and len(report.failures) == 3
        assert [sample["id"] for sample in decoded(tmp_path / "a")] == [item.id for item in some[:full]]
        write_shards(some, read, SCHEMA, tmp_path / "a", shard_bytes=20_000, resume=True, progress=False)
        assert [sample["id"] for sample in decoded(tmp_path / "a")] == [item.id for item in some]

    def test_nothing_that_can_be_read(self, tmp_path):
        report = write_shards([Item("a", "a.tif", "broken")], read, SCHEMA, tmp_path / "new", progress=False)
        assert (report.written, report.exit_code) == (0, 2)
        assert list((tmp_path / "new").iterdir()) == []
        with pytest.raises(ValueError, match="nothing to convert"):
            write_shards([], read, SCHEMA, tmp_path)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_interrupted_and_resumed(self, tmp_path, error):
        """Whole shards of an interrupted run are kept, out of sight; the end is as if nothing had happened."""
        write(tmp_path / "whole")

        def stopped(item):
            if item.payload == 8:
                raise error
            return read(item)

        output = tmp_path / "stopped"
        with pytest.raises(error):
            write_shards(items(11), stopped, SCHEMA, output, shard_bytes=30_000, progress=False)
        assert shard_files(output, required=False) == [] and not list(output.rglob("*.part"))
        assert list((output / ".train.partial").iterdir())
        with pytest.raises(FileNotFoundError, match=r"begun and not finished: convert with --resume"):
            shard_files(output)
        with pytest.raises(FileExistsError, match=r"was begun and not finished. Pass --resume"):
            write(output)
        report = write(output, resume=True)
        assert report.reused > 0 and contents(output) == contents(tmp_path / "whole")

    def test_refuses_to_replace(self, tmp_path):
        write(tmp_path, count=3)
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match=r"is already there. Pass --resume .*--overwrite"):
            write(tmp_path)
        with pytest.raises(ValueError, match="was made of other items"):
            write_shards(items(5)[2:], read, SCHEMA, tmp_path, resume=True, progress=False)
        with pytest.raises(ValueError, match="with another description"):
            write_shards(items(3), read, SCHEMA.select(["s2"]), tmp_path, resume=True, progress=False)
        assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))
        write(tmp_path, count=3, split="val")
        assert set(before) < set(contents(tmp_path))

    def test_overwrite_replaces_only_when_complete(self, tmp_path):
        write(tmp_path)
        before = contents(tmp_path)

        def stopped(item):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_shards(items(3), stopped, SCHEMA, tmp_path, overwrite=True, progress=False)
        assert contents(tmp_path) == before
        write(tmp_path, count=3, overwrite=True)
        assert [sample["id"] for sample in decoded(tmp_path)] == ["chip-0", "chip-1", "chip-2"]

    @pytest.mark.parametrize("before", [False, True])
    def test_interrupted_while_shards_got_their_names(self, tmp_path, monkeypatch, before):
        """All is read: it only remains to go on with the names. Shards of an earlier run go."""
        write(tmp_path / "whole")
        assert len(contents(tmp_path / "whole")) > 2
        output = tmp_path / "stopped"
        if before:
            write(output, count=3)
        replace = os.replace

        def interrupted(source, target):
            if "-00001-of-" in str(target):
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(output, overwrite=True)
        report = write(output, resume=True)
        assert report.reused == 11 and contents(output) == contents(tmp_path / "whole")
        assert not (output / ".train.partial").exists()

    def test_resume_of_what_is_complete_reads_nothing(self, tmp_path):
        write(tmp_path)
        before = contents(tmp_path)

        def never(item):
            raise AssertionError

        report = write_shards(items(11), never, SCHEMA, tmp_path, resume=True, progress=False)
        assert (report.reused, report.written) == (11, 11) and contents(tmp_path) == before

    def test_split_name(self, tmp_path):
        with pytest.raises(ValueError, match="`split` must be"):
            write(tmp_path, split="../train")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_no_permission(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            write(tmp_path / "locked" / "new")


@pytest.mark.usefixtures("small_groups")
class TestInspection:
    def test_describe(self, tmp_path):
        report = write(tmp_path)
        description = describe_shards(tmp_path)
        samples = [make_sample(index) for index in range(11)]
        assert (description["samples"], description["places"], description["shards"]) == (11, 3, len(report.shards))
        assert description["modalities"]["s1"]["missing"] == 3 and description["modalities"]["s2"]["missing"] == 0
        assert description["modalities"]["dem"]["sizes"] == {"8 x 8": 11}
        assert description["modalities"]["dem"]["gsd"] == (30.0, 30.0)
        assert description["labels"]["crop"]["histogram"] == {"wheat": 4, "maize": 4, "rye": 3}
        assert description["labels"]["cover"]["histogram"] == {"water": 5, "forest": 11}
        masks = np.stack([sample.labels["flood"] for sample in samples if "flood" in sample.labels])
        expected = {name: int((masks == code).sum()) for code, name in ((-1, "ignored"), (0, "dry"), (1, "wet"))}
        assert description["labels"]["flood"]["histogram"] == expected
        assert description["labels"]["flood"]["missing"] == 2

    def test_validate_finds_what_is_wrong(self, tmp_path):
        report = write(tmp_path, shard_bytes=1 << 20)
        table = pq.read_table(report.shards[0])
        rows = table.to_pylist()
        rows[1]["s2"] = rows[1]["s2"][:-2]
        rows[2]["id"] = rows[3]["id"]
        rows[4]["s2"] = bytes(len(rows[4]["s2"]))
        rows[5]["crop"] = 7
        rows[6]["dem__gsd"] = None
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), report.shards[0])
        problems = validate_shards(tmp_path)
        for index, message in (
            (0, "chip-1: cannot reshape"),
            (1, "chip-3: the id is also in"),
            (2, "chip-4: `s2` has not one valid pixel"),
            (3, "chip-5: `crop` is 7"),
            (4, "chip-6: `dem` has a gsd of None"),
        ):
            assert message in problems[index]
        assert len(problems) == 5

    def test_values_that_mark_missing_data_in_the_precision_of_the_pixels(self, tmp_path):
        spec = {"bands": ["VV"], "unit": "db", "gsd": 10.0, "dtype": "float32", "nodata": [-999.9, 1e20]}
        pixels = np.array([[[-999.9, 1e20]]], dtype=np.float32)
        make = lambda item: Sample("a", "p", {"s1": Layer(pixels)})  # noqa: E731
        write_shards([Item("a", "a", 0)], make, ShardSchema({"s1": spec}), tmp_path, progress=False)
        assert "has not one valid pixel" in validate_shards(tmp_path)[0]

    def test_a_shard_without_samples(self, tmp_path):
        report = write(tmp_path)
        pq.write_table(pq.read_table(report.shards[1])[:0], report.shards[1])
        (problem,) = validate_shards(tmp_path)
        assert problem.startswith(f"{report.shards[1].name}: holds not one sample")

    def test_damaged_and_missing_files(self, tmp_path):
        report = write(tmp_path)
        whole = report.shards[1].read_bytes()
        report.shards[1].write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"is damaged: .* Convert it again"):
            read_schema(tmp_path)
        report.shards[1].unlink()
        with pytest.raises(FileNotFoundError, match=f"has {len(report.shards) - 1} of its {len(report.shards)} shards"):
            read_schema(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"No shards of the split `val` in .* Splits there: \['train'\]"):
            read_schema(tmp_path, "val")
        with pytest.raises(FileNotFoundError, match="neither a folder nor the id of a data set"):
            read_schema(tmp_path / "absent")

    def test_shards_of_two_data_sets(self, tmp_path):
        first = write(tmp_path / "a", count=2, shard_bytes=1 << 20).shards[0]
        schema = SCHEMA.select(["s2"], [])
        only = lambda item: Sample(item.id, "p", {"s2": make_sample(item.payload).images["s2"]})  # noqa: E731
        second = write_shards(items(2), only, schema, tmp_path / "b", progress=False).shards[0]
        os.replace(first, tmp_path / "a" / "train-00000-of-00002.parquet")
        os.replace(second, tmp_path / "a" / "train-00001-of-00002.parquet")
        with pytest.raises(ValueError, match="differ in what they hold"):
            read_schema(tmp_path / "a")
