"""The Hub of the tests does to the real client what the Hub does."""

import hashlib
import os

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from interpreters import run_python


os.environ["HF_HUB_DISABLE_XET"] = "1"
WEIGHTS = os.urandom(300_000)


@pytest.fixture(params=[None, 70_000], ids=["basic", "multipart"])
def hub(request, tmp_path):
    with HubServer(tmp_path / "hub", multipart=request.param) as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=TOKEN)


def stranger(hub):
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def pushed(hub, api, tmp_path):
    """A repository with a regular and a large file, pushed by the client."""
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "er" / "note.txt").write_text("note")
    api.create_repo("me/model")
    return api.upload_folder(repo_id="me/model", folder_path=folder)


def download(api, tmp_path, path, repo_id="me/model", **options):
    file = api.hf_hub_download(repo_id, path, cache_dir=tmp_path / "cache", **options)
    with open(file, "rb") as opened:
        return opened.read()


def test_round_trip(hub, api, pushed, tmp_path):
    hub.reset_counters()
    assert download(api, tmp_path, "model.safetensors") == WEIGHTS
    assert download(api, tmp_path, "config.json") == b"{}"
    assert download(api, tmp_path, "deep/er/note.txt") == b"note"
    assert hub.served == {"model.safetensors": len(WEIGHTS), "config.json": 2, "deep/er/note.txt": 4}
    download(api, tmp_path, "model.safetensors")
    assert hub.served["model.safetensors"] == len(WEIGHTS), "the second time it comes from the cache"
    assert sorted(api.list_repo_files("me/model")) == ["config.json", "deep/er/note.txt", "model.safetensors"]
    info = api.model_info("me/model", files_metadata=True)
    large = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert (large.size, large.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert api.get_paths_info("me/model", ["config.json"])[0].size == 2
    assert api.whoami()["name"] == "me"


def test_equal_content_is_not_sent_again(hub, api, pushed, tmp_path):
    hub.reset_counters()
    api.upload_file(repo_id="me/model", path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors")
    assert not [path for method, path, _ in hub.requests if method == "PUT"]
    assert download(api, tmp_path, "copy.safetensors") == WEIGHTS


def test_deleting_and_history(hub, api, pushed, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model-trunk.safetensors").write_bytes(b"trunk")
    api.upload_folder(
        repo_id="me/model",
        folder_path=tmp_path / "new",
        delete_patterns=["model*.safetensors"],
        commit_message="Second",
    )
    assert sorted(hub.files("me/model")) == ["config.json", "deep/er/note.txt", "model-trunk.safetensors"]
    assert download(api, tmp_path, "model.safetensors", revision=pushed.oid) == WEIGHTS
    assert [commit.title for commit in api.list_repo_commits("me/model")][:1] == ["Second"]
    api.delete_folder("deep", repo_id="me/model")
    assert sorted(hub.files("me/model")) == ["config.json", "model-trunk.safetensors"]


def test_branches_tags_and_pull_requests(hub, api, pushed, tmp_path):
    api.create_branch("me/model", branch="other/try")
    api.upload_file(repo_id="me/model", path_or_fileobj=b"1", path_in_repo="config.json", revision="other/try")
    api.create_tag("me/model", tag="v1", revision="other/try")
    request = api.upload_file(repo_id="me/model", path_or_fileobj=b"2", path_in_repo="config.json", create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    for revision, content in {"main": b"{}", "other/try": b"1", "v1": b"1", "refs/pr/1": b"2"}.items():
        assert download(api, tmp_path, "config.json", revision=revision) == content
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert {branch.name for branch in refs.branches} == {"main", "other/try"}
    assert [tag.name for tag in refs.tags] == ["v1"] and len(refs.pull_requests) == 1
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("me/model", branch="other/try")
    api.create_branch("me/model", branch="other/try", exist_ok=True)
    api.delete_branch("me/model", branch="other/try")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="other/try")


def test_many_files_come_in_pages(hub, api, tmp_path):
    hub.put("me/many", {f"{index % 3}/file-{index}.txt": b"x" for index in range(55)})
    assert len(list(api.list_repo_tree("me/many", recursive=True))) == 55 + 3
    assert len(list(api.list_repo_tree("me/many", "1"))) == 18
    folder = api.snapshot_download("me/many", cache_dir=tmp_path / "cache", allow_patterns=["1/*"])
    assert len(os.listdir(f"{folder}/1")) == 18 and os.listdir(folder) == ["1"]


def test_who_may_do_what(hub, api, pushed, tmp_path):
    api.create_repo("me/secret", private=True)
    api.upload_file(repo_id="me/secret", path_or_fileobj=b"s", path_in_repo="file.txt")
    assert download(api, tmp_path, "file.txt", repo_id="me/secret") == b"s"
    with pytest.raises(RepositoryNotFoundError):
        stranger(hub).model_info("me/secret")
    with pytest.raises(RepositoryNotFoundError):
        download(stranger(hub), tmp_path / "2", "file.txt", repo_id="me/secret")
    assert download(stranger(hub), tmp_path / "3", "model.safetensors") == WEIGHTS
    hub.users["hf_other"] = "other"
    for token, status in (("hf_other", "403"), ("hf_wrong", "401"), (False, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            HfApi(endpoint=hub.url, token=token).upload_file(
                repo_id="me/model", path_or_fileobj=b"x", path_in_repo="file.txt"
            )
    hub.read_only_tokens.add(TOKEN)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("me/another")


def test_what_is_not_there(hub, api, pushed, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        download(api, tmp_path, "config.json", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        download(api, tmp_path, "nothing.json")
    assert api.repo_exists("me/model") and not api.repo_exists("me/nothing")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/model")
    assert api.create_repo("me/model", exist_ok=True).repo_id == "me/model"
    api.delete_repo("me/model")
    assert not api.repo_exists("me/model")


def test_stale_parent_and_paths_outside(hub, api, pushed):
    first = api.model_info("me/model").sha
    api.upload_file(repo_id="me/model", path_or_fileobj=b"1", path_in_repo="a.txt")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/model", [CommitOperationAdd("b.txt", b"2")], commit_message="x", parent_commit=first)
    operation = CommitOperationAdd("b.txt", b"2")
    operation.path_in_repo = "../b.txt"
    with pytest.raises(HfHubHTTPError, match="no path inside a repository"):
        api.create_commit("me/model", [operation], commit_message="x")


def test_faults(hub, api, pushed, tmp_path):
    large = os.urandom(24_000_000)
    hub.put("me/large", {"model.safetensors": large})
    hub.fail("/storage/", cut_after=15_000_000)
    assert download(api, tmp_path, "model.safetensors", repo_id="me/large") == large
    # The client writes 10 MB at a time, and goes on behind the last that it wrote.
    assert hub.served["model.safetensors"] == 15_000_000 + 24_000_000 - 10 * 2**20
    hub.fail("/api/models/me/model", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("me/model")
    hub.fail("/api/models/me/model", delay=0.2)
    assert api.model_info("me/model").id == "me/model"


def test_command_line_and_data_sets(hub, tmp_path):
    """`hf upload`, and a data set read by `datasets`, each in a process of its own."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(WEIGHTS)
    script = """
        import subprocess, sys, os
        import pyarrow, pyarrow.parquet
        from datasets import load_dataset
        from huggingface_hub import HfApi

        hf = os.path.join(os.path.dirname(sys.executable), "hf")
        subprocess.run([hf, "upload", "me/by-hand", "folder", "."], check=True, stdout=subprocess.DEVNULL)
        pyarrow.parquet.write_table(pyarrow.table({"x": list(range(10))}), "part.parquet")
        api = HfApi()
        api.create_repo("me/table", repo_type="dataset")
        place = {"repo_id": "me/table", "repo_type": "dataset", "path_in_repo": "a.parquet"}
        api.upload_file(path_or_fileobj="part.parquet", **place)
        print([row["x"] for row in load_dataset("me/table", split="train", streaming=True)])
    """
    output = run_python(script, tmp_path, hub.environment(tmp_path / "home"))
    assert output.splitlines()[-1] == str(list(range(10)))
    assert hub.read("me/by-hand", "weights.safetensors") == WEIGHTS
