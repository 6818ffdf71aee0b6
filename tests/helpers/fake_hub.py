"""A model hub on this machine's loopback, as far as huggingface_hub asks it: files of commits, new repositories."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class FakeHub:
    """For a `with` statement.

    Attributes:
        url: where it is.
        commits: files by name, by (repository, hash).
        asked: method and path of every request.
    """

    def __init__(self):
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.asked.append(f"HEAD {self.path}")
                self.answer(*hub.resolve(self.path), body=False)

            def do_GET(self):
                hub.asked.append(f"GET {self.path}")
                self.answer(*hub.resolve(self.path))

            def do_POST(self):
                hub.asked.append(f"POST {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(hub.post(self.path, body)).encode())

            def answer(self, status, headers, content, body=True):
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """A commit; its hash."""
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[repository, commit] = files
        return commit

    def resolve(self, path: str):
        """Status, headers and content of a file."""
        owner, name, _, commit, file = unquote(urlparse(path).path).lstrip("/").split("/", 4)
        known = {repository for repository, _ in self.commits}
        files = self.commits.get((f"{owner}/{name}", commit))
        if files is None or file not in files:
            lacking = "RepoNotFound" if f"{owner}/{name}" not in known else "RevisionNotFound"
            return 404, {"X-Error-Code": lacking if files is None else "EntryNotFound"}, b""
        tag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}, files[file]

    def post(self, path: str, body: bytes):
        """What the interface answers."""
        if path == "/api/repos/create":
            content = json.loads(body)
            owner = f"{content['organization']}/" if content.get("organization") else ""
            return {"url": f"{self.url}/{owner}{content['name']}"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            repository = "/".join(path.split("/")[3:5])
            commit = self.add(repository, {name: base64.b64decode(text) for name, text in files.items()})
            return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repository}/commit/{commit}"}
        return {}
