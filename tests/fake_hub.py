"""A Hub on loopback that holds one repository: what huggingface_hub asks of the real one.

It answers requests for ranges, counts the bytes of weights that went out, and can lose connections.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """The repository NAME with the files of a folder; `url` is for HF_ENDPOINT.

    sent      bytes of weights that went out, by file
    asked     ranges of weights: (file, first, last)
    failures  how many of the next requests for weights are refused with 503
    cut       whether connections are lost in the middle of weights
    """

    name: str
    folder: Path
    url: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    failures: int = 0
    cut: bool = False

    def entries(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path.relative_to(self.folder).as_posix(),
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                if path.suffix == ".safetensors":
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                found.append(entry)
        return found


@contextmanager
def fake_hub(name: str, folder: Path) -> Iterator[FakeHub]:
    """The Hub, until the end of the block."""
    hub = FakeHub(name=name, folder=folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut and self.path.endswith(".safetensors"):
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        def tell(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "/paths-info/" in self.path:
                wanted = set(re.findall(r"[\w./-]+", unquote(content.decode())))
                self.tell([e for e in hub.entries() if e["path"] in wanted])
            else:
                self.answer(404, b"{}")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api, resolve = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": entry["path"]} for entry in hub.entries()]
                self.tell({"id": hub.name, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"{api}/tree/"):
                self.tell(hub.entries())
            elif path.startswith(f"{api}/refs"):
                self.tell({"branches": [], "tags": [], "converts": []})
            elif path.startswith(resolve):
                self.give(path[len(resolve) :].partition("/")[2])
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        def give(self, file: str) -> None:
            target = hub.folder / file
            if not target.is_file():
                self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            content = target.read_bytes()
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            told = {"ETag": tag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            weights = target.suffix == ".safetensors" and self.command == "GET"
            if weights and hub.failures:
                hub.failures -= 1
                self.answer(503, b"")
                return
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if match is None:
                if weights:
                    hub.sent[file] = hub.sent.get(file, 0) + len(content)
                self.answer(200, content, **told)
                return
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            part = content[first : last + 1]
            if weights:
                hub.sent[file] = hub.sent.get(file, 0) + len(part)
                hub.asked.append((file, first, last))
            told["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, part, **told)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
