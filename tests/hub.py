"""A server on loopback that speaks as much of the Hub's protocol as its client libraries ask for, with faults on order.

It serves the files below `root`/datasets/USER/NAME and `root`/models/USER/NAME, and takes uploads of models there. Only
the real huggingface_hub talks to it: in this process after `Hub.here(monkeypatch)`, in others by `Hub.environment`.

As on the Hub, a request for a parquet file at an address with /resolve/ in it is counted, and answered with a signed
address on another host (here: another port), which takes no token and ends after an hour. Here it ends after so many
reads, so that no test depends on how fast it runs.
"""

import base64
import contextlib
import functools
import hashlib
import json
import math
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import huggingface_hub.hf_api
import psutil

TOKEN = "hf_of_the_tests"
COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"  # every repository has this one; "main" stands for it


class Hub(ThreadingHTTPServer):
    """faults: consumed one a read of a file: a status, "503 Retry-After", "reset", "truncate", "stall", "other range",
    "whole" (in answer to a range), or None.

    refusals: consumed one a request with /resolve/ in its address: a status, or None. limit: (n, seconds), so many of
    these are answered in a window of so many seconds, the others 429; or None. limited: how many were.
    resolved: the file of each signed address. uses: reads that one serves before it ends; None for any number.
    open: an Event; while it is not set, nothing is resolved.
    reads: (file, range) of each read from one. leaked: tokens that their host was sent.
    gated: names of repositories that anybody may list and nobody fetch. private: those that are there for TOKEN only.
    requests: (method, path, Range) of what was asked of the Hub itself. sent: bytes of files sent, by the RANK of the
    process that asked, or by "alone". created: {name of a repository: "private" or "public"}. renamed: {old: new name}.
    latency: seconds before an address or a file's first byte. main: the commit that "main" stands for now. older: {an
    earlier commit: the root of its files}. trickle: send a byte in so many seconds, or None.
    """

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = Path(root), f"http://127.0.0.1:{self.server_port}"
        self.faults, self.gated, self.private, self.requests, self.sent = [], set(), set(), [], Counter()
        self.created, self.uploads, self.stopped, self.lock = {}, {}, threading.Event(), threading.Lock()
        self.refusals, self.limit, self.limited, self.window, self.latency = [], None, 0, (0, 0), 0.0
        self.resolved, self.reads, self.leaked, self.used, self.uses = [], [], [], Counter(), None
        self.started, self.renamed, self.open = time.monotonic(), {}, threading.Event()
        self.main, self.older, self.trickle = COMMIT, {}, None
        self.open.set()
        self.signed_host = ThreadingHTTPServer(("127.0.0.1", 0), SignedHandler)
        self.signed_host.daemon_threads, self.signed_host.hub = True, self
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def here(self, monkeypatch, token=None):
        """Point this process's huggingface_hub to the server, as the environment variables would have before import."""
        for name in ("ENDPOINT", "HF_ENDPOINT"):
            if hasattr(huggingface_hub.constants, name):
                monkeypatch.setattr(huggingface_hub.constants, name, self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        for name in ("HF_ASSETS_CACHE", "HF_HUB_CACHE"):
            monkeypatch.setattr(huggingface_hub.constants, name, str(self.root / name))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", self.root / "HF_DATASETS_CACHE")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    def resolves(self):
        """The paths of all requests with /resolve/ in their address, in their order."""
        return [path for _, path, _ in self.requests if "/resolve/" in path]

    def now(self):
        """Seconds since the start."""
        return time.monotonic() - self.started

    def address(self, kind, name, file, commit=""):
        """A new signed address of a file at a commit."""
        where = f"127.0.0.1:{self.signed_host.server_port}"
        with self.lock:
            self.resolved.append(file)
            return f"http://{where}/{kind}/{name}/{file}?commit={commit}&X-Amz-Signature={len(self.resolved) - 1}"

    def serves(self, serial):
        """Count a read from a signed address: whether there is such an address, and it has not ended."""
        with self.lock:
            self.used[serial] += 1
            return serial in map(str, range(len(self.resolved))) and self.used[serial] <= (self.uses or math.inf)

    def seconds_to_wait(self):
        """Count a request against the limit: 0 if it is within, otherwise the seconds until the next window."""
        with self.lock:
            requests, seconds = self.limit or (1, 1)
            number = int(self.now() / seconds)
            used = self.window[1] if self.limit and self.window[0] == number else 0
            self.window = (number, used + 1)
            self.limited += used >= requests
            return (number + 1) * seconds - self.now() if used >= requests else 0

    def files(self, kind, name, commit=""):
        """{path in the repository: path here} at a commit, or in a later one."""
        folder = self.older.get(commit, self.root) / kind / name
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def rank_of(self, port):
        """The RANK of the process that holds the other end of a connection: that of a run's, if it is one."""
        for connection in psutil.net_connections("tcp"):
            if connection.laddr.port == port and connection.pid:
                with contextlib.suppress(psutil.Error):
                    return psutil.Process(connection.pid).environ().get("RANK", "alone")
        return "alone"


@contextlib.contextmanager
def serving(root):
    """A running Hub for the files below `root`."""
    hub = Hub(root)
    for server in (hub, hub.signed_host):
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        for server in (hub, hub.signed_host):
            server.shutdown()
            server.server_close()


def digest_of(path):
    return digest(path, path.stat().st_mtime_ns)


@functools.cache
def digest(path, changed):
    """SHA-256 of a file as it was when last changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart, and would wait for each other
    rank = None

    @property
    def hub(self):
        return self.server

    def log_message(self, *values):
        pass

    # ---- answers

    def answer(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_read(self, kind, name, files=False):
        """Whether the repository, or also its files, is there and open; if not, the refusal is sent."""
        hidden = name in self.hub.private and not self.logged_in()
        if hidden or not (self.hub.root / kind / name).is_dir():
            self.refuse(404 if self.logged_in() else 401, "RepoNotFound", "Repository not found")
        elif files and name in self.hub.gated:
            self.refuse(403 if self.logged_in() else 401, "GatedRepo", f"Access to {name} is restricted")
        else:
            return True
        return False

    def may_resolve(self):
        """Whether the limit allows another request with /resolve/, and none is to be refused."""
        if wait := self.hub.seconds_to_wait():
            policy = '"fixed window";"resolvers";q={};w={}'.format(*self.hub.limit)
            limit = {"RateLimit": f'"resolvers";r=0;t={int(wait)}', "RateLimit-Policy": policy}
            self.answer({"error": "too many requests"}, 429, **limit)
            return False
        with self.hub.lock:
            status = self.hub.refusals.pop(0) if self.hub.refusals else None
        if status:
            self.refuse(status, "GatedRepo" if status in (401, 403) else "", "on order")
        return status is None

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ---- requests

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, commit, file = match.groups("models")
            if name in self.hub.renamed:
                self.answer({}, 307, Location=self.path.replace(name, self.hub.renamed[name], 1))
            elif self.may_read(kind, name, files=True) and self.may_resolve():
                here = self.hub.files(kind, name, commit).get(file)
                if here and file.endswith(".parquet"):  # large files lie on another host
                    facts = {"X-Linked-Size": here.stat().st_size, "X-Linked-ETag": f'"{digest_of(here)}"'}
                    time.sleep(self.hub.latency)
                    self.hub.open.wait()
                    where = self.hub.address(kind, name, file, commit)
                    commit = commit if commit in self.hub.older else self.hub.main
                    self.answer({}, 302, Location=where, X_Repo_Commit=commit, **facts)
                else:
                    self.send_file(here)
        elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            if self.may_read(*match.groups()[:2]):
                self.answer(self.information(*match.groups()))
        elif match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            kind, name, commit, folder = match.groups("")
            if self.may_read(kind, name):
                recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
                self.answer(self.tree(kind, name, commit, folder, recursive))
        elif path == "/api/whoami-v2" and self.logged_in():
            self.answer({"name": "user", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        else:
            self.refuse(404, "EntryNotFound", f"{path} is not served")

    do_HEAD = do_GET

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append((self.command, path, None))
        if match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            kind, name, commit = match.groups()
            if self.may_read(kind, name):
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
                entries = {entry["path"]: entry for entry in self.tree(kind, name, commit, "", recursive=True)}
                self.answer([entries[path] for path in wanted if path in entries])
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.logged_in():
            self.refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            lfs = ("lfs", "regular")
            files = [{"path": f["path"], "shouldIgnore": False, "oid": None} for f in json.loads(body)["files"]]
            self.answer(
                {"files": [f | {"uploadMode": lfs[not f["path"].endswith(("safetensors", "png"))]} for f in files]}
            )
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            upload = [
                o | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": upload})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse(404, "EntryNotFound", f"{path} is not served")

    def do_PUT(self):
        body = self.body()
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "", f"the content is not that of {oid}")
            return
        self.hub.uploads[oid] = body
        self.answer({})

    # ---- repositories

    def information(self, kind, name, commit):
        files, sha = self.hub.files(kind, name, commit), commit if commit in self.hub.older else self.hub.main
        return {
            "id": name, "sha": sha, "private": name in self.hub.private, "gated": name in self.hub.gated,
            "tags": [], "lastModified": "2024-01-01T00:00:00.000Z", "siblings": [{"rfilename": f} for f in files],
            "disabled": False, "downloads": 0, "likes": 0,
        }  # fmt: skip

    def tree(self, kind, name, commit, folder, recursive):
        """Files and folders below `folder`, as the Hub lists them."""
        entries, prefix = {}, f"{folder}/" if folder else ""
        for path, here in self.hub.files(kind, name, commit).items():
            if not path.startswith(prefix):
                continue
            parents = [str(parent) for parent in Path(path).parents if str(parent) not in (".", folder)]
            entries |= {parent: {"type": "directory", "path": parent, "oid": "0", "size": 0} for parent in parents}
            oid = digest_of(here)[:40]
            entries[path] = {"type": "file", "path": path, "oid": oid, "size": here.stat().st_size}
        return [entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(prefix)]

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        folder = self.hub.root / "models" / name
        if not name.startswith("user/"):
            self.refuse(403, "", f"You don't have the rights to create a model under the namespace {name}")
        else:
            status = 409 if folder.exists() else 200
            folder.mkdir(parents=True, exist_ok=True)
            visibility = self.hub.created.setdefault(name, wanted.get("visibility", "public"))
            if visibility == "private":
                self.hub.private.add(name)
            self.answer({"url": f"{self.hub.url}/{name}", "name": name, "private": False}, status)

    def commit(self, name, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            path = self.hub.root / "models" / name / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                base64.b64decode(value["content"]) if line["key"] == "file" else self.hub.uploads[value["oid"]]
            )
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})

    # ---- files

    def send_file(self, path):
        fault = None
        if self.command == "GET":
            with self.hub.lock:
                fault = self.hub.faults.pop(0) if self.hub.faults else None
        if fault == "503 Retry-After":
            self.answer({"error": "busy"}, 503, Retry_After=1)
        elif isinstance(fault, int):
            self.answer({}, fault)
        elif path is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            self.send_range(path, fault)

    def send_range(self, path, fault):
        time.sleep(self.hub.latency)
        size = path.stat().st_size
        asked = None if fault == "whole" else self.headers.get("Range")
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "bytes=0-").groups()
        start, end = (int(first), int(last or size - 1) + 1) if first else (max(0, size - int(last)), size)
        if fault == "other range":  # as long as the one asked for, where the file allows
            start, end = start + 1, end + 1
        end = min(end, size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{digest_of(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.rank is None:  # of this connection, which one handler serves
            self.rank = self.hub.rank_of(self.client_address[1])
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(end - start)
        if fault in ("reset", "truncate", "stall"):
            body = body[: len(body) // 2]
        while self.hub.trickle and body and not self.hub.stopped.wait(self.hub.trickle):
            self.wfile.write(body[:1])
            body = body[1:]
        self.wfile.write(body)
        with self.hub.lock:
            self.hub.sent[self.rank] += len(body)
        self.close_connection = fault is not None
        if fault == "stall":
            self.wfile.flush()
            self.hub.stopped.wait()
        elif fault == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class SignedHandler(Handler):
    """The host of signed addresses."""

    @property
    def hub(self):
        return self.server.hub

    def do_GET(self):
        url = urlsplit(self.path)
        kind, user, name, file = unquote(url.path)[1:].split("/", 3)
        if token := self.headers.get("Authorization"):
            self.hub.leaked.append(token)
        if not self.hub.serves(parse_qs(url.query).get("X-Amz-Signature", [""])[0]):
            self.answer({"Code": "AccessDenied"}, 403)
        else:
            with self.hub.lock:
                self.hub.reads.append((file, self.headers.get("Range")))
            commit = parse_qs(url.query).get("commit", [""])[0]
            self.send_file(self.hub.files(kind, f"{user}/{name}", commit).get(file))

    do_HEAD = do_GET
