"""A loopback server that speaks what uploads and downloads of models use of the Hugging Face Hub's HTTP API."""

import base64
import hashlib
import json
import threading
from typing import Any

import yaml
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter, Map, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

LFS_SIZE = 10 * 1024**2
LFS_SUFFIXES = (".bin", ".gz", ".h5", ".model", ".npy", ".npz", ".onnx", ".parquet", ".png", ".pt", ".safetensors")


class RepoConverter(BaseConverter):
    """Matches "namespace/name", and a bare "name" too so that it is answered as a missing repo."""

    regex = "[^/]+(?:/[^/]+)?"


ROUTES = Map(
    [
        Rule("/api/whoami-v2", endpoint="whoami", methods=["GET"]),
        Rule("/api/validate-yaml", endpoint="validate_yaml", methods=["POST"]),
        Rule("/api/repos/create", endpoint="create", methods=["POST"]),
        Rule("/api/models/<repo:repo_id>", endpoint="info", methods=["GET"]),
        Rule("/api/models/<repo:repo_id>/revision/<revision>", endpoint="info", methods=["GET"]),
        Rule("/api/models/<repo:repo_id>/tree/<revision>", endpoint="tree", methods=["GET"]),
        Rule("/api/models/<repo:repo_id>/tree/<revision>/<path:folder>", endpoint="tree", methods=["GET"]),
        Rule("/api/models/<repo:repo_id>/preupload/<revision>", endpoint="preupload", methods=["POST"]),
        Rule("/api/models/<repo:repo_id>/commit/<revision>", endpoint="commit", methods=["POST"]),
        Rule("/<repo:repo_id>.git/info/lfs/objects/batch", endpoint="lfs_batch", methods=["POST"]),
        Rule("/lfs/<oid>/<int:size>", endpoint="lfs_put", methods=["PUT"]),
        Rule("/<repo:repo_id>/resolve/<revision>/<path:path>", endpoint="resolve", methods=["GET"]),
    ],
    converters={"repo": RepoConverter},
)


def answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(json.dumps(content), status, headers, mimetype="application/json")


def refusal(status: int, message: str, code: str = "", sha: str = "") -> HTTPException:
    """Return an error to raise; from its code the client chooses the exception."""
    headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": sha}
    return HTTPException(response=answer({"error": message}, status, {k: v for k, v in headers.items() if v}))


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Tell whether the Hub keeps a file outside of git."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or "tfevents" in path or b"\0" in sample or size > LFS_SIZE)


def describe(path: str, content: bytes) -> dict[str, Any]:
    """Return a file's entry in a listing; `etag` is the hash by which the client knows the content."""
    size, oid = len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": size, "oid": oid, "etag": oid}
    if is_lfs(path, size, content[:512]):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"etag": sha256, "lfs": {"oid": sha256, "size": size, "pointerSize": 134}}
    return entry


class HubServer:
    """A Hub of public models on 127.0.0.1 that serves while the `with` block runs.

    Attributes:
        url: Where it listens, the client's endpoint.
        token: The only token that it accepts.
        user: The token's owner, the namespace of a repo that is created without one.
        repos: From a repo's id to a dict from path to content at the head of main; a test may fill it by hand.
        commits: The repo's id and the first line of each commit, oldest first.
        refuse: A status to refuse every write with, if not None.
    """

    def __init__(self, token: str = "hf_loopback", user: str = "user"):
        self.token, self.user = token, user
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.refuse: int | None = None
        self._revisions: dict[tuple[str, str], dict[str, bytes]] = {}
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        try:
            endpoint, values = ROUTES.bind_to_environ(environ).match()
            writes = request.method in ("POST", "PUT") and endpoint != "validate_yaml"
            # An LFS object is put without a token, as to the signed address of a bucket.
            needs_token = endpoint == "whoami" or (writes and endpoint != "lfs_put")
            if needs_token and request.headers.get("Authorization") != f"Bearer {self.token}":
                raise refusal(401, "Invalid credentials in Authorization header")
            if writes and self.refuse:
                raise refusal(self.refuse, "This server refuses writes")
            response = getattr(self, f"_{endpoint}")(request, **values)
        except HTTPException as error:
            response = error
        return response(environ, start_response)

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return the commit's hash and files; it is a hash of the content so that a test may write to `repos`."""
        if repo_id not in self.repos:
            raise refusal(404, "Repository not found", "RepoNotFound")
        head = dict(self.repos[repo_id])
        etags = [(path, describe(path, content)["etag"]) for path, content in sorted(head.items())]
        sha = hashlib.sha1(json.dumps([repo_id, etags]).encode()).hexdigest()
        self._revisions[repo_id, sha] = head
        sha = sha if revision == "main" else revision
        if (repo_id, sha) not in self._revisions:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self._revisions[repo_id, sha]

    def _whoami(self, request: Request) -> Response:
        return answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def _validate_yaml(self, request: Request) -> Response:
        try:
            yaml.safe_load(request.json["content"].partition("---\n")[2].partition("\n---")[0])
        except yaml.YAMLError as error:
            return answer({"errors": [{"message": str(error)}]}, 400)
        return answer({"errors": [], "warnings": []})

    def _create(self, request: Request) -> Response:
        repo_id = f"{request.json.get('organization') or self.user}/{request.json['name']}"
        status = 409 if repo_id in self.repos else 200
        self.repos.setdefault(repo_id, {})
        return answer({"url": f"{self.url}/{repo_id}"}, status)

    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Response:
        sha, files = self._files(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return answer({"id": repo_id, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
        sha, files = self._files(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        if folder and not inside:
            raise refusal(404, f"{folder} does not exist", "EntryNotFound", sha)
        if request.args.get("recursive", "").lower() != "true":
            inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
        return answer([describe(path, files[path]) for path in inside])

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        _, files = self._files(repo_id, revision)
        modes = []
        for path, size, sample in ((file["path"], file["size"], file["sample"]) for file in request.json["files"]):
            mode = "lfs" if is_lfs(path, size, base64.b64decode(sample)) else "regular"
            # From the old hash the client sees what it need not send again.
            old = describe(path, files[path])["etag"] if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old})
        return answer({"files": modes})

    def _lfs_batch(self, request: Request, repo_id: str) -> Response:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in request.json["objects"]]
        for item in objects:
            if item["oid"] not in self._objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}/{item['size']}"}}
        return answer({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, oid: str, size: int) -> Response:
        content = request.get_data()
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise refusal(400, "The object's size or SHA256 is not the promised one")
        self._objects[oid] = content
        return Response()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        if revision != "main" or request.args.get("create_pr"):
            raise refusal(400, "This server commits to main only")
        with self._lock:
            files, summary = dict(self._files(repo_id, "main")[1]), ""
            for line in map(json.loads, request.get_data().splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    summary = value["summary"]
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile" and value["oid"] in self._objects:
                    files[value["path"]] = self._objects[value["oid"]]
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise refusal(400, f"Cannot commit {key} {value.get('path')}")
            self.repos[repo_id] = files
            self.commits.append((repo_id, summary))
            sha, _ = self._files(repo_id, "main")
        return answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        sha, files = self._files(repo_id, revision)
        if path not in files:
            raise refusal(404, "Entry not found", "EntryNotFound", sha)
        response = Response(files[path], headers={"X-Repo-Commit": sha}, mimetype="application/octet-stream")
        response.set_etag(describe(path, files[path])["etag"])
        return response.make_conditional(request, accept_ranges=True, complete_length=len(files[path]))
