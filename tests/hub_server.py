"""A Hugging Face Hub on loopback, for tests with the real client: as much of the HTTP API as pushing and pulling models
and data sets takes. Repositories with commits, branches, tags and pull requests; regular and LFS files (basic and
multipart), or Xet with its local store; private repositories and tokens; range requests; counters; faults on request.

By hand: `python tests/hub_server.py FOLDER`, and `HF_ENDPOINT` set to what it prints.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


USER, TOKEN = "me", "hf_test"
LARGE = (".safetensors", ".parquet", ".png", ".bin", ".npz")  # stored as LFS, as the Hub does by .gitattributes
CHUNK = 1 << 20
PAGE = 20  # entries of a tree per answer: few, so that clients have to ask for the next page


class Error(Exception):
    """An answer that is not a success; `code` goes into `X-Error-Code`, by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = ""):
        super().__init__(message)
        self.status, self.message = status, message
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in named.items() if value}


class Entry(NamedTuple):
    """A file of a commit."""

    sha256: str
    size: int
    large: bool

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.sha256[:40]  # real git hashes the content with a header


class Commit(NamedTuple):
    parent: str | None
    title: str
    tree: dict[str, Entry]


@dataclass
class Repository:
    """One model or data set: commits, and the names that point to them."""

    kind: str
    name: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branches, and pull requests as refs/pr/N
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add_commit(self, ref: str, title: str, tree: dict[str, Entry], parent: str | None) -> str:
        identity = json.dumps([self.kind, self.name, parent, title, sorted(tree.items()), len(self.commits)])
        commit_id = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[commit_id] = Commit(parent, title, tree)
        self.refs[ref] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str:
        commit_id = self.refs.get(revision) or self.tags.get(revision) or revision
        if commit_id not in self.commits:
            raise Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id


class Fault(NamedTuple):
    """What happens to requests whose path holds `path`."""

    path: str
    method: str
    cut_after: int | None = None  # close the connection after so many bytes of the body
    status: int | None = None
    delay: float | None = None


class HubServer:
    """The server and what a test wants to know of it.

    Args:
        folder (`Path`): Where blobs are kept.
        xet (`bool`): Whether large files are offered and taken by the Xet protocol, with a store in `folder`.
        multipart (`int`, *optional*): Large files are taken in parts of so many bytes.
    """

    def __init__(self, folder: Path, *, xet: bool = False, multipart: int | None = None):
        self.folder = Path(folder)
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.xet = xet
        self.multipart = multipart
        self.users = {TOKEN: USER}
        self.read_only_tokens: set[str] = set()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.xet_hashes: dict[str, str] = {}  # sha256 to Xet hash
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.reset_counters()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self._http.daemon_threads = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        """Where large files lie: another host name, to which a client must not send its token."""
        return f"http://localhost:{self.port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables for a process that uses this Hub with a cache of its own."""
        variables = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        variables.update(
            HF_ENDPOINT=self.url,
            HF_HOME=str(home),
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HUB_DISABLE_XET="0" if self.xet else "1",
            NO_PROXY="127.0.0.1,localhost",
        )
        if token is not None:
            variables["HF_TOKEN"] = token
        return variables

    def reset_counters(self) -> None:
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.served: Counter[str] = Counter()  # bytes of files that went out, by name

    @property
    def bytes_served(self) -> int:
        return sum(self.served.values())

    def fail(self, path: str, *, method: str = "GET", times: int = 1, **what) -> None:
        """Let the next `times` requests whose path holds `path` fail: `cut_after=`, `status=` or `delay=`."""
        self.faults += [Fault(path, method, **what)] * times

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    self.faults.remove(fault)
                    return fault
        return None

    # Repositories, for a test that sets the scene without HTTP.

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        if (kind, repo_id) not in self.repositories:
            raise Error(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, repo_id]

    def create(self, repo_id: str, kind: str = "model", private: bool = False) -> Repository:
        repository = self.repositories[kind, repo_id] = Repository(kind, repo_id, private)
        repository.add_commit("main", "initial commit", {}, None)
        return repository

    def put(self, repo_id: str, files: dict[str, bytes | None], kind: str = "model", revision: str = "main") -> str:
        """Commit files, whatever they are called and hold; `None` deletes."""
        if (kind, repo_id) not in self.repositories:
            self.create(repo_id, kind)
        repository = self.repository(repo_id, kind)
        parent = repository.resolve(revision)
        tree = dict(repository.commits[parent].tree)
        for path, content in files.items():
            if content is None:
                tree.pop(path)
            else:
                tree[path] = Entry(self.store(content), len(content), path.endswith(LARGE))
        return repository.add_commit(revision, "put", tree, parent)

    def put_folder(self, repo_id: str, folder: Path, kind: str = "model") -> None:
        """Commit the files of a folder, however large."""
        if (kind, repo_id) not in self.repositories:
            self.create(repo_id, kind)
        tree = {}
        for file in sorted(Path(folder).iterdir()):
            with file.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            shutil.copyfile(file, self.blob(sha256))
            tree[file.name] = Entry(sha256, file.stat().st_size, file.name.endswith(LARGE))
        repository = self.repository(repo_id, kind)
        repository.add_commit("main", "put", tree, repository.resolve("main"))

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, Entry]:
        repository = self.repository(repo_id, kind)
        return repository.commits[repository.resolve(revision)].tree

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        return self.blob(self.files(repo_id, revision, kind)[path].sha256).read_bytes()

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return sha256

    def learn_xet_hashes(self, folder: Path) -> None:
        """With Xet the content of a file goes to the store under a hash of its own, which a commit does not tell. The
        real Hub reads it in the store; here it is computed from equal files.
        """
        import hf_xet

        for file in Path(folder).iterdir():
            if file.name.endswith(LARGE):
                sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                self.xet_hashes[sha256] = hf_xet.hash_files([str(file)])[0].hash


class Handler(BaseHTTPRequestHandler):
    """Requests, by `ROUTES` at the end of the file."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that leaves is no error of ours
            super().handle()

    def do(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.fault = self.hub.take_fault(self.command, unquote(parts.path))
        self.content = self.read_body()
        try:
            if self.fault is not None and self.fault.delay is not None:
                time.sleep(self.fault.delay)
            if self.fault is not None and self.fault.status is not None:
                raise Error(self.fault.status, "a fault that the test asked for")
            for method, pattern, action in ROUTES:
                found = pattern.fullmatch(parts.path)
                if found and self.command in method:
                    action(self, **{name: unquote(value) for name, value in found.groupdict().items() if value})
                    return
            raise Error(404, f"No route for {self.command} {parts.path}")
        except Error as error:
            self.answer({"error": error.message}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self) -> Any:
        return json.loads(self.content or b"{}")

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.start(status, {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # Who asks, and for what.

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Error(401, "Invalid credentials")
        return self.hub.users.get(token)

    def readable(self, kind: str, repo_id: str) -> Repository:
        repository = self.hub.repositories.get((kind, repo_id))
        user = self.user()
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            # The Hub does not tell strangers what there is.
            raise Error(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, kind: str, repo_id: str) -> Repository:
        self.require_writer(repo_id.split("/")[0])
        return self.readable(kind, repo_id)

    def require_writer(self, namespace: str) -> None:
        user = self.user()
        if user is None:
            raise Error(401, "Log in first: this needs a token")
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if user != namespace or token in self.hub.read_only_tokens:
            raise Error(403, f"You are not allowed to write to {namespace}")

    # Accounts and repositories.

    def whoami(self) -> None:
        if self.user() is None:
            raise Error(401, "Invalid credentials")
        self.answer({"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def empty(self) -> None:
        self.answer({})

    def create_repository(self) -> None:
        asked = self.json()
        namespace = asked.get("organization") or self.user()
        self.require_writer(namespace)
        kind, repo_id = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repositories:
                self.answer({"error": "You already created this repository", "url": url}, 409)
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.create(repo_id, kind, bool(private))
        self.answer({"url": url, "name": repo_id})

    def delete_repository(self) -> None:
        asked = self.json()
        kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or self.user()}/{asked['name']}"
        self.writable(kind, repo_id)
        del self.hub.repositories[kind, repo_id]
        self.answer({})

    def info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repository = self.readable(kind, repo_id)
        commit_id = repository.resolve(revision)
        siblings = []
        for path, entry in sorted(repository.commits[commit_id].tree.items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1].update(size=entry.size, blobId=entry.oid)
                if entry.large:
                    siblings[-1]["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
        head = {"id": repo_id, "modelId": repo_id, "sha": commit_id, "private": repository.private, "tags": []}
        self.answer({**head, "siblings": siblings, "cardData": {}, "downloads": 0, "likes": 0, "gated": False})

    def list_entries(self, repository: Repository, commit_id: str, under: str, recursive: bool) -> list[dict]:
        prefix = f"{under}/" if under else ""
        tree = repository.commits[commit_id].tree
        entries, folders = [], set()
        for path, entry in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                folders.add(prefix + "/".join(inner[:depth]))
            if len(inner) == 1 or recursive:
                entries.append(self.describe(path, entry))
        if not recursive:
            folders = {folder for folder in folders if "/" not in folder[len(prefix) :]}
        if prefix and not entries and not folders:
            raise Error(404, f"{under} does not exist", "EntryNotFound")
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + entries

    def describe(self, path: str, entry: Entry) -> dict:
        described = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid[:40]}
        if entry.large:
            described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            if self.hub.xet and entry.sha256 in self.hub.xet_hashes:
                described["xetHash"] = self.hub.xet_hashes[entry.sha256]
        return described

    def tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> None:
        repository = self.readable(kind, repo_id)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = self.list_entries(repository, repository.resolve(revision), path, recursive)
        first = int(self.query.get("cursor", 0))
        headers = {}
        if first + PAGE < len(entries):
            recursive = "&recursive=true" if recursive else ""
            there = f"{self.hub.url}{urlsplit(self.path).path}?cursor={first + PAGE}{recursive}"
            headers["Link"] = f'<{there}>; rel="next"'
        self.answer(entries[first : first + PAGE], **headers)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.readable(kind, repo_id)
        text = self.content.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        tree = repository.commits[repository.resolve(revision)].tree
        self.answer([self.describe(path, tree[path]) for path in paths if path in tree])

    def list_refs(self, kind: str, repo_id: str) -> None:
        repository = self.readable(kind, repo_id)

        def named(prefix, refs):
            return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": commit} for name, commit in refs.items()]

        branches = {name: commit for name, commit in repository.refs.items() if not name.startswith("refs/")}
        pulls = {name: commit for name, commit in repository.refs.items() if name.startswith("refs/")}
        answer = {"branches": named("refs/heads/", branches), "tags": named("refs/tags/", repository.tags)}
        self.answer({**answer, "converts": [], "pullRequests": named("", pulls)})

    def list_commits(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.readable(kind, repo_id)
        commit_id, commits = repository.resolve(revision), []
        while commit_id is not None:
            commit = repository.commits[commit_id]
            commits.append({"id": commit_id, "title": commit.title, "message": "", "authors": [{"user": USER}]})
            commits[-1]["date"] = "2026-01-01T00:00:00.000Z"
            commit_id = commit.parent
        self.answer(commits)

    def create_ref(self, kind: str, repo_id: str, what: str, name: str) -> None:
        """A branch by its name; a tag by the revision in the path and its name in the body."""
        repository = self.writable(kind, repo_id)
        if what == "branch":
            refs, start = repository.refs, self.json().get("startingPoint") or "main"
        else:
            refs, start, name = repository.tags, name, self.json()["tag"]
        if name in refs:
            raise Error(409, f"Reference {name} already exists")
        refs[name] = repository.resolve(start)
        self.answer({})

    def delete_ref(self, kind: str, repo_id: str, what: str, name: str) -> None:
        repository = self.writable(kind, repo_id)
        if (repository.refs if what == "branch" else repository.tags).pop(name, None) is None:
            raise Error(404, f"No {what} {name}", "RevisionNotFound")
        self.answer({})

    # Pushing.

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.writable(kind, repo_id)
        repository.resolve(revision)
        modes = []
        for file in self.json()["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10 * CHUNK else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer({"files": modes})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        self.writable(kind, repo_id)
        objects = []
        for asked in self.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if not self.hub.blob(oid).is_file():  # else it is there already, and nothing is to be done
                href = f"{self.hub.storage_url}/storage/{oid}"
                upload = {"href": href}
                if self.hub.multipart is not None:
                    count = -(-size // self.hub.multipart)
                    parts = {str(part): f"{href}/{part}" for part in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self.hub.multipart), **parts}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{repo_id}"}}
            objects.append(answer)
        self.answer({"transfer": "multipart" if self.hub.multipart else "basic", "objects": objects})

    def put_blob(self, oid: str, part: str = "") -> None:
        if part:
            (self.hub.folder / f"{oid}.part{part}").write_bytes(self.content)
        elif self.hub.store(self.content) != oid:
            self.hub.blob(hashlib.sha256(self.content).hexdigest()).unlink()
            raise Error(400, "The content does not have the hash that was announced")
        self.answer(b"", ETag=f'"{hashlib.md5(self.content).hexdigest()}"')

    def complete_blob(self, oid: str) -> None:
        content = b""
        for part in sorted(self.json()["parts"], key=lambda part: part["partNumber"]):
            file = self.hub.folder / f"{oid}.part{part['partNumber']}"
            if part["etag"] != f'"{hashlib.md5(file.read_bytes()).hexdigest()}"':
                raise Error(400, "A part is not what was uploaded")
            content += file.read_bytes()
            file.unlink()
        if self.hub.store(content) != oid:
            raise Error(400, "The content does not have the hash that was announced")
        self.answer({})

    def verify(self) -> None:
        asked = self.json()
        blob = self.hub.blob(asked["oid"])
        if not blob.is_file() or blob.stat().st_size != asked["size"]:
            raise Error(404, "The content has not arrived")
        self.answer({})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.writable(kind, repo_id)
        with self.hub.lock:
            parent = repository.resolve(revision)
            tree = dict(repository.commits[parent].tree)
            title = ""
            for line in self.content.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, parent):
                        raise Error(412, "A commit has happened since: the parent is stale")
                else:
                    self.apply(operation["key"], value, tree)
            ref = revision
            if "create_pr" in self.query:
                ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.refs)}"
            commit_id = repository.add_commit(ref, title, tree, parent)
        answer = {"success": True, "commitOid": commit_id, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit_id}"}
        if ref != revision:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{ref.rsplit('/', 1)[1]}"
        self.answer(answer)

    def apply(self, operation: str, value: dict, tree: dict[str, Entry]) -> None:
        path = value["path"]
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise Error(400, f"{path} is no path inside a repository")
        if operation == "file":
            content = base64.b64decode(value["content"])
            tree[path] = Entry(self.hub.store(content), len(content), False)
        elif operation == "lfsFile":
            if not self.hub.xet and not self.hub.blob(value["oid"]).is_file():
                raise Error(400, f"The content of {path} has not arrived")
            tree[path] = Entry(value["oid"], value["size"], True)
        elif operation == "deletedFile":
            tree.pop(path, None)
        elif operation == "deletedFolder":
            for name in [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                del tree[name]
        else:
            raise Error(400, f"Unknown operation {operation}")

    # Pulling.

    def resolve(self, repo_id: str, revision: str, path: str, kind: str = "model") -> None:
        repository = self.readable(kind, repo_id)
        commit_id = repository.resolve(revision)
        entry = repository.commits[commit_id].tree.get(path)
        if entry is None:
            # With the commit the client remembers that the file does not exist.
            raise Error(404, "Entry not found", "EntryNotFound", commit_id)
        headers = {"X-Repo-Commit": commit_id, "Accept-Ranges": "bytes"}
        if not entry.large:
            self.send_blob(entry, path, {**headers, "ETag": f'"{entry.oid}"'})
            return
        headers["X-Linked-Size"] = str(entry.size)
        headers["X-Linked-Etag"] = f'"{entry.sha256}"'
        headers["Location"] = f"{self.hub.storage_url}/storage/{entry.sha256}?name={path}"
        if self.hub.xet and entry.sha256 in self.hub.xet_hashes:
            headers["X-Xet-Hash"] = self.hub.xet_hashes[entry.sha256]
            kinds = f"{kind}s"
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/{kinds}/{repo_id}/xet-read-token/{commit_id}"
        self.answer(b"", 302, **headers)

    def get_blob(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Error(400, "A token was sent to a host that is not the Hub")
        size = self.hub.blob(oid).stat().st_size
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        self.send_blob(Entry(oid, size, True), self.query.get("name", oid), headers)

    def send_blob(self, entry: Entry, name: str, headers: dict[str, str]) -> None:
        first, last, status = 0, entry.size - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, status = int(asked.group(1)), 206
            last = min(last, int(asked.group(2) or last))
            if first > last:
                raise Error(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{entry.size}"
        self.start(status, {**headers, "Content-Length": str(last + 1 - first)})
        if self.command == "HEAD":
            return
        end = last + 1
        if self.fault is not None and self.fault.cut_after is not None:
            end = min(end, first + self.fault.cut_after)
        with self.hub.blob(entry.sha256).open("rb") as file:
            file.seek(first)
            while first < end:
                content = file.read(min(CHUNK, end - first))
                self.wfile.write(content)
                first += len(content)
                with self.hub.lock:
                    self.hub.served[name] += len(content)
        if end <= last:
            self.close_connection = True

    def xet_token(self, kind: str, repo_id: str, access: str) -> None:
        (self.writable if access == "write" else self.readable)(kind, repo_id)
        expiration = int(time.time()) + 3600
        connection = {"casUrl": f"local://{self.hub.folder}/xet", "accessToken": "xet", "exp": expiration}
        headers = {"X-Xet-Cas-Url": connection["casUrl"], "X-Xet-Access-Token": "xet"}
        self.answer(connection, **headers, **{"X-Xet-Token-Expiration": str(expiration)})


def _routes() -> list[tuple[tuple[str, ...], re.Pattern, Any]]:
    repo = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
    read, rev = ("GET", "HEAD"), r"(?P<revision>[^/]+)"
    table = [
        (("GET",), r"/api/whoami-v2", Handler.whoami),
        (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
        (("GET",), r"/api/agent-harnesses", Handler.empty),
        (("POST",), r"/api/repos/create", Handler.create_repository),
        (("DELETE",), r"/api/repos/delete", Handler.delete_repository),
        (read, repo, Handler.info),
        (read, rf"{repo}/revision/{rev}", Handler.info),
        (("GET",), rf"{repo}/tree/{rev}(/(?P<path>.+))?", Handler.tree),
        (("POST",), rf"{repo}/paths-info/{rev}", Handler.paths_info),
        (("GET",), rf"{repo}/refs", Handler.list_refs),
        (("GET",), rf"{repo}/commits/{rev}", Handler.list_commits),
        (("POST",), rf"{repo}/(?P<what>branch|tag)/(?P<name>[^/]+)", Handler.create_ref),
        (("DELETE",), rf"{repo}/(?P<what>branch|tag)/(?P<name>[^/]+)", Handler.delete_ref),
        (("POST",), rf"{repo}/preupload/{rev}", Handler.preupload),
        (("POST",), rf"{repo}/commit/{rev}", Handler.commit),
        (("GET",), rf"{repo}/xet-(?P<access>read|write)-token/[^/]+", Handler.xet_token),
        (
            ("POST",),
            r"/((?P<kind>dataset)s/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
            _model(Handler.lfs_batch),
        ),
        (("POST",), r"/verify/.+", Handler.verify),
        (("PUT",), r"/storage/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", Handler.put_blob),
        (("POST",), r"/storage/(?P<oid>[0-9a-f]{64})/complete", Handler.complete_blob),
        (read, r"/storage/(?P<oid>[0-9a-f]{64})", Handler.get_blob),
        (read, rf"/(?P<kind>dataset)s/(?P<repo_id>[^/]+/[^/]+)/resolve/{rev}/(?P<path>.+)", Handler.resolve),
        (read, rf"/(?P<repo_id>[^/]+/[^/]+)/resolve/{rev}/(?P<path>.+)", Handler.resolve),
    ]
    return [(methods, re.compile(pattern), action) for methods, pattern, action in table]


def _model(action):
    """Paths of models do not name the kind."""
    return lambda handler, kind="model", **names: action(handler, kind, **names)


ROUTES = _routes()


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
