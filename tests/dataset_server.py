"""A data set repository on loopback: as much of the Hub's HTTP API as reading files of one needs, over a folder."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(folder: Path, repo_id: str) -> ThreadingHTTPServer:
    """Serve the files of `folder` as the data set `repo_id`; `server.bytes_sent` counts what went out of files."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, content, code=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def files(self):
            return [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.name.encode()).hexdigest(),
                }
                for path in sorted(folder.glob("*.parquet"))
            ]

        def do_POST(self):  # paths-info
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.answer([entry for entry in self.files() if entry["path"] in wanted])

        def do_GET(self):
            path = self.path.split("?")[0]
            if path.startswith(f"/api/datasets/{repo_id}/tree/"):
                self.answer(self.files())
            elif path.startswith(f"/api/datasets/{repo_id}"):
                siblings = [{"rfilename": entry["path"]} for entry in self.files()]
                self.answer({"id": repo_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            elif path.startswith(f"/datasets/{repo_id}/resolve/"):
                self.send_file(folder / path.rsplit("/", 1)[1])
            else:
                self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def send_file(self, file):
            content = file.read_bytes()
            headers = {"ETag": f'"{file.name}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            asked = self.headers.get("Range")
            if asked is None:
                self.answer(content, **headers)
                return
            first, last = asked.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content) - 1) + 1]
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            server.bytes_sent += len(part)
            self.answer(part, 206, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bytes_sent = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
