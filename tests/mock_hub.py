"""A Hugging Face hub on 127.0.0.1, as much of it as huggingface_hub 0.36 to 2.4 need to download and to upload.

Hub(root) serves root/models/OWNER/NAME/BRANCH/files and root/datasets/...; the commit of a branch is a hash of what it
holds. Files with a suffix in LFS have a sha256 and are redirected to /cdn/, as on the hub; others have git's blob id.

    cut        the first GET of every LFS file ends after so many bytes, and the connection is closed
    flip       names of files that are sent with one bit wrong
    stall      names of files of which only the first half is sent, then nothing
    gated      repositories that need a token
    log        one dict for every request
"""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt", ".idx")
EMPTY = ".gitattributes"  # what a new repository holds


def use(monkeypatch, url):
    """Direct huggingface_hub, which reads HF_ENDPOINT when it is imported, to a hub."""
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # 0.36 has it in both
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.cut, self.flip, self.stall, self.gated, self.log = root, 0, set(), set(), set(), []
        self.was_cut, self.hashes = set(), {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def oid(self, file):
        """The sha256 of an LFS file; of another one, git's name of the blob."""
        key = file, file.stat().st_mtime_ns, file.stat().st_size
        if key not in self.hashes:
            data = file.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data)
            self.hashes[key] = (hashlib.sha256(data) if file.suffix in LFS else git).hexdigest()
        return self.hashes[key]

    def find(self, repo, name):
        """(directory, commit, files) of a branch or commit; None if there is none."""
        for directory in sorted(path for path in (self.root / repo).iterdir() if path.is_dir()):
            files = {f.relative_to(directory).as_posix(): f for f in sorted(directory.rglob("*")) if f.is_file()}
            content = [directory.name, *((rel, self.oid(f)) for rel, f in files.items())]
            commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()
            if name in (directory.name, commit):
                return directory, commit, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    REPO = r"([\w.-]+/[\w.-]+)"
    GET = (
        (rf"/api/(models|datasets)/{REPO}/refs", "refs"),
        (rf"/api/(models|datasets)/{REPO}(?:/revision/([^/]+))?", "info"),
        (rf"/api/(models|datasets)/{REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
        (rf"/(?:(datasets)/)?{REPO}/resolve/([^/]+)/(.+)", "resolve"),
        (rf"/cdn/(models|datasets)/{REPO}/([0-9a-f]{{40}})/(.+)", "content"),
    )
    POST = (
        (r"/api/repos/create", "create"),
        (r"/api/validate-yaml", "validate"),
        (rf"/api/models/{REPO}/branch/([^/]+)", "branch"),
        (rf"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
        (rf"/{REPO}\.git/info/lfs/objects/batch", "lfs"),
        (rf"/api/models/{REPO}/commit/([^/]+)", "commit"),
    )

    log_message = lambda *_: None  # noqa: E731

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        for pattern, name in self.GET:
            if match := re.fullmatch(pattern, path):
                kind, repo, revision, rest = (*match.groups(), None, None)[:4]
                repo = f"{kind or 'models'}/{repo}"
                if not (self.server.root / repo).is_dir():
                    return self.error("RepoNotFound")
                if repo in self.server.gated and not self.headers.get("Authorization"):
                    return self.error("GatedRepo", 401)
                if name == "refs":
                    return self.refs(repo)
                if not (found := self.server.find(repo, revision or "main")):
                    return self.error("RevisionNotFound")
                return getattr(self, name)(repo, rest, *found)
        return self.error("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, name in self.POST:
            if match := re.fullmatch(pattern, path):
                return getattr(self, name)(body, *match.groups())
        return self.error("RepoNotFound")

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert hashlib.sha256(data).hexdigest() == oid
        (self.server.root / "objects").mkdir(exist_ok=True)
        (self.server.root / "objects" / oid).write_bytes(data)
        self.begin(200, 0)

    def begin(self, status, length, **headers):
        entry = {"method": self.command, "path": self.path, "range": self.headers.get("Range"), "status": status}
        self.server.log.append(entry)
        self.send_response(status)
        for key, value in {"Content-Length": length, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        return self.command != "HEAD"

    def error(self, code, status=404):
        self.begin(status, 0, X_Error_Code=code)

    def json(self, value, status=200):
        data = json.dumps(value).encode()
        if self.begin(status, len(data), Content_Type="application/json"):
            self.wfile.write(data)

    # Downloads

    def entries(self, files):
        for rel, file in files.items():
            oid, size = self.server.oid(file), file.stat().st_size
            lfs = {"lfs": {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}} if file.suffix in LFS else {}
            yield {
                "type": "file",
                "path": rel,
                "rfilename": rel,
                "size": size,
                "oid": oid[:40],
                "blobId": oid[:40],
            } | lfs

    def info(self, repo, _, directory, commit, files):
        self.json({"id": repo.partition("/")[2], "sha": commit, "siblings": list(self.entries(files))})

    def tree(self, repo, folder, directory, commit, files):
        inside = {rel: f for rel, f in files.items() if rel.startswith(f"{folder}/" if folder else "")}
        self.json(list(self.entries(inside))) if inside else self.error("EntryNotFound")

    def refs(self, repo):
        names = sorted(path.name for path in (self.server.root / repo).iterdir() if path.is_dir())
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": self.server.find(repo, n)[1]} for n in names]
        self.json({"branches": heads, "converts": [], "tags": []})

    def resolve(self, repo, rel, directory, commit, files):
        if not (file := files.get(rel)):
            return self.error("EntryNotFound")
        if file.suffix not in LFS:
            return self.content(repo, rel, directory, commit, files)
        place = f"{self.server.url}/cdn/{repo}/{commit}/{quote(rel)}"
        return self.begin(
            302,
            0,
            Location=place,
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{self.server.oid(file)}"',
            X_Linked_Size=file.stat().st_size,
        )

    def content(self, repo, rel, directory, commit, files):
        file, lfs = files[rel], files[rel].suffix in LFS
        data = bytearray(file.read_bytes())
        headers = {"ETag": f'"{self.server.oid(file)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        first, last, status = 0, len(data) - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last, status = int(match[1]), min(int(match[2] or last), last), 206
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        if rel in self.server.flip:
            data[-1] ^= 1
        if not self.begin(status, last + 1 - first, **headers):
            return
        if rel in self.server.stall:
            self.wfile.write(data[first : len(data) // 2])
            while rel in self.server.stall:
                time.sleep(0.05)
            self.close_connection = True
            return
        cut = self.server.cut if lfs and self.path not in self.server.was_cut else 0
        if cut:
            self.close_connection = not self.server.was_cut.add(self.path)
        self.wfile.write(data[first : min(first + cut, last + 1) if cut else last + 1])

    # Uploads

    def create(self, body):
        request = json.loads(body)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        directory = self.server.root / "models" / repo / "main"
        if directory.exists():
            return self.json({"url": f"{self.server.url}/{repo}", "error": "exists"}, 409)
        directory.mkdir(parents=True)
        (directory / EMPTY).write_text("*.safetensors filter=lfs\n")
        return self.json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def validate(self, body):
        self.json({"errors": [], "warnings": []})

    def branch(self, body, repo, name):
        directory = self.server.root / "models" / repo / name
        if directory.exists():
            return self.json({"error": "exists"}, 409)
        shutil.copytree(directory.with_name("main"), directory)
        return self.json({})

    def preupload(self, body, repo, revision):
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
        files = self.server.find(f"models/{repo}", revision)[2]
        oids = {path: self.server.oid(files[path]) for path in paths if path in files}
        answer = [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": oids.get(p)} for p, m in modes.items()]
        self.json({"files": answer})

    def lfs(self, body, repo):
        objects = []
        for each in json.loads(body)["objects"]:
            href = f"{self.server.url}/upload/{each['oid']}"
            there = (self.server.root / "objects" / each["oid"]).exists()
            objects.append(each | ({} if there else {"actions": {"upload": {"href": href, "header": {}}}}))
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, body, repo, revision):
        directory = self.server.root / "models" / repo / revision
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            path = directory / value.get("path", "")
            if entry["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                shutil.copy(self.server.root / "objects" / value["oid"], path)
            elif entry["key"] == "deletedFile":
                path.unlink()
        commit = self.server.find(f"models/{repo}", revision)[1]
        self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})
