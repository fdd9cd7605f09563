"""A small fake of Kaggle's HTTP service on loopback, for the official client as it is.

    with Service(competitions={"products-10k": folder}) as service:
        environment |= service.environment      the client sends what it sends to this one
        service.outputs["some-one/vipr-01-eda"] = {"submissions/01_eda/run.json": b"..."}
        service.failures["SaveKernel"] = [failure(429)]     the next answer; then as usual

Datasets, kernels, their versions, statuses and outputs are kept in memory. A kernel that is pushed
is queued, runs, and is complete with the outputs placed for it; or `run` (see `Session`) really
executes it in a tree like Kaggle's. Requests and answers are those of kagglesdk 0.1.
"""

import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 1 << 30  # of a request
PAGE = 20  # outputs in an answer, as of the real one


class Refusal(Exception):
    """An answer other than 200."""


@dataclass
class Kernel:
    """Versions that were pushed, and what the latest came to."""

    versions: list = field(default_factory=list)  # requests
    statuses: list = field(default_factory=list)  # to come; the last one stays
    outputs: dict = field(default_factory=dict)  # name -> bytes
    message: str = ""
    log: str = ""


class Service:
    """See the head of this file. owner: the account that the client is configured for."""

    def __init__(self, owner="some-one", competitions=(), run=None):
        self.owner, self.run = owner, run
        self.competitions = {name: [] for name in competitions}  # -> submissions
        self.closed = set()  # competitions that take no submissions
        self.datasets, self.kernels = {}, {}  # datasets: versions, each name -> bytes
        self.dataset_statuses = defaultdict(list)
        self.outputs = {}  # kernel -> files that it will leave
        self.failures = defaultdict(list)  # request -> what it answers first
        self.blobs, self.truncated, self.requests = {}, [], []
        self.threads = []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self):
        """The client's own settings: it calls http://localhost, by way of this as a proxy."""
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        proxies = dict.fromkeys(["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"], address)
        return proxies | {
            "NO_PROXY": "",
            "no_proxy": "",
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": self.owner,
            "KAGGLE_KEY": "none",
        }

    def called(self, name):
        """Bodies of the requests of this name."""
        return [body for request, body in self.requests if request == name]

    def answer(self, name, body):
        """The answer to a request of the SDK; a Refusal for what it refuses."""
        self.requests.append((name, body))
        if self.failures[name]:
            failure = self.failures[name].pop(0)
            if isinstance(failure, Refusal):
                raise failure
            return failure(self, body) if callable(failure) else failure
        return getattr(self, name)(body)

    # ---------------------------------------------------------------------------------- datasets

    def GetDatasetStatus(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if name not in self.datasets:
            raise failure(403, "Permission 'datasets.get' was denied")
        statuses = self.dataset_statuses[name]
        return {"status": statuses.pop(0) if statuses else "READY"}

    def CreateDataset(self, body):
        return self._add_version(f"{body['ownerSlug']}/{body['slug']}", body)

    def CreateDatasetVersion(self, body):
        return self._add_version(f"{body['ownerSlug']}/{body['datasetSlug']}", body["body"])

    def _add_version(self, name, body):
        files = [self.blobs[file["token"]] for file in body["files"]]
        self.datasets.setdefault(name, []).append(dict(files))
        return {"status": "ok", "url": f"https://www.kaggle.com/datasets/{name}", "ref": name}

    def StartBlobUpload(self, body):
        token = secrets.token_hex(8)
        self.blobs[token] = body["name"], b""
        return {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    # ----------------------------------------------------------------------------------- kernels

    def SaveKernel(self, body):
        name, sources = body["slug"], body.get("datasetDataSources", [])
        kernel = self.kernels.setdefault(name, Kernel())
        kernel.versions.append(body)
        kernel.message, kernel.log = "", ""
        kernel.statuses = ["QUEUED", "RUNNING", "COMPLETE"]
        if self.run:
            kernel.statuses = ["RUNNING"]
            thread = threading.Thread(target=self._run, args=(name, kernel), daemon=True)
            thread.start()
        else:
            kernel.outputs = self.outputs.get(name, {})
            kernel.log = json.dumps([{"stream_name": "stdout", "time": 1.0, "data": "done\n"}])
        competitions, kernels = (
            body.get(f"{kind}DataSources", []) for kind in ("competition", "kernel")
        )
        return {
            "ref": name,
            "url": f"https://www.kaggle.com/code/{name}",
            "versionNumber": len(kernel.versions),
            "invalidDatasetSources": [s for s in sources if s not in self.datasets],
            "invalidCompetitionSources": [s for s in competitions if s not in self.competitions],
            "invalidKernelSources": [s for s in kernels if s not in self.kernels],
        }

    def _run(self, name, kernel):
        status, kernel.outputs, kernel.log = self.run(self, name)
        kernel.message = "" if status == "COMPLETE" else "Your notebook ended with an error"
        kernel.statuses = [status]

    def _kernel(self, body):
        name = f"{body['userName']}/{body['kernelSlug']}"
        if name not in self.kernels:
            raise failure(403, "Permission 'kernels.get' was denied")
        return name, self.kernels[name]

    def GetKernelSessionStatus(self, body):
        _, kernel = self._kernel(body)
        status = kernel.statuses.pop(0) if len(kernel.statuses) > 1 else kernel.statuses[0]
        return {"status": status, "failureMessage": kernel.message or None}

    def ListKernelSessionOutput(self, body):
        """The latest version's, whatever version is asked for."""
        name, kernel = self._kernel(body)
        start = int(body.get("pageToken") or 0)
        end = start + (body.get("pageSize") or PAGE)
        names = sorted(kernel.outputs)
        files = [
            {"fileName": file, "url": f"http://localhost/output/{name}/{quote(file)}"}
            for file in names[start:end]
        ]
        following = str(end) if end < len(names) else ""
        return {"files": files, "log": kernel.log, "nextPageToken": following}

    def GetAcceleratorQuotaStatistics(self, body):
        gpu = {"timeUsed": "36000s", "totalTimeAllowed": "72000s"}
        return {"quotaRefreshTime": "2026-01-03T00:00:00Z", "gpuQuota": gpu}

    # ------------------------------------------------------------------------------ competitions

    def _competition(self, body):
        if body["competitionName"] not in self.competitions:
            raise failure(404, "Not found")
        return self.competitions[body["competitionName"]]

    def ListDataFiles(self, body):
        self._competition(body)
        return {"files": [{"name": "train.csv", "totalBytes": 10}]}

    def StartSubmissionUpload(self, body):
        self._competition(body)
        return self.StartBlobUpload({"name": body["fileName"]})

    def CreateSubmission(self, body):
        if body["competitionName"] in self.closed:
            raise failure(400, "Submission not allowed: the competition takes no submissions")
        self._competition(body).append(self.blobs[body["blobFileTokens"]][1])
        return {"message": f"Successfully submitted to {body['competitionName']}", "ref": 7}

    def GetSubmissionLimits(self, body):
        return {"numAllowedNow": 4}


def failure(code, message="Try again later"):
    """An answer of this HTTP status."""
    return Refusal(code, message)


def handler(service):
    """The class of the server's request handlers."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def content(self):
            length = int(self.headers.get("Content-Length") or 0)
            if length > MOST_BYTES:
                raise ValueError(f"a request of {length} bytes")
            return self.rfile.read(length)

        def send(self, code, content, length=None):
            self.send_response(code)
            kind = "application/json" if isinstance(content, dict) else "application/octet-stream"
            self.send_header("Content-Type", kind)
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            if length != -1:
                self.send_header("Content-Length", str(length or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            name, body = self.path.split("/")[-1], json.loads(self.content() or b"{}")
            try:
                self.send(200, service.answer(name, body))
            except Refusal as refusal:
                code, message = refusal.args
                self.send(code, {"code": code, "message": f"{code} Error: {message}"})

        def do_PUT(self):
            token = urlsplit(self.path).path.rpartition("/")[2]
            service.blobs[token] = service.blobs[token][0], self.content()
            self.send(200, b"")

        def do_GET(self):
            _, _, owner, slug, name = urlsplit(self.path).path.split("/", 4)
            data = service.kernels[f"{owner}/{slug}"].outputs[unquote(name)]
            if not service.truncated:
                return self.send(200, data)
            how = service.truncated.pop(0)  # 'length': is told, 'silent': is not
            self.send(200, data[: len(data) // 2], len(data) if how == "length" else -1)

        def log_message(self, *_):
            pass

    return Handler


# ----------------------------------------------------------------------------------- the real thing


@dataclass
class Session:
    """`run` of a Service: papermill executes what was pushed in a tree like Kaggle's, offline.

    work: a folder a kernel, with kaggle/input (read-only, by Kaggle's present names), working and
    temp. competitions: name -> data root. No package of the checkout is on the path.
    """

    work: Path
    competitions: dict
    seconds: dict = field(default_factory=dict)

    def __call__(self, service, name):
        """(status, outputs, log) of a kernel that was pushed, as papermill leaves them."""
        started, place = time.monotonic(), self.work / name.split("/")[1]
        shutil.rmtree(place, ignore_errors=True)
        working, notebook = place / "kaggle" / "working", place / "pushed.ipynb"
        working.mkdir(parents=True)
        body = service.kernels[name].versions[-1]
        self.attach(service, body, place / "kaggle" / "input")
        notebook.write_text(body["text"], encoding="utf-8")
        command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-k", "python3"]
        done = subprocess.run(
            [*command, "--no-progress-bar", "--log-output"],
            cwd=working,
            env=os.environ | places(place),
            capture_output=True,
            text=True,
            errors="replace",
        )
        self.seconds[name] = time.monotonic() - started
        files = [file for file in working.rglob("*") if file.is_file()]
        outputs = {file.relative_to(working).as_posix(): file.read_bytes() for file in files}
        return "ERROR" if done.returncode else "COMPLETE", outputs, done.stdout + done.stderr

    def attach(self, service, body, inputs):
        """Datasets, with their zips unpacked, competitions, outputs of kernels; all read-only."""
        for name in body.get("datasetDataSources", []):
            for file, content in service.datasets[name][-1].items():
                unpack(inputs / "datasets" / name, file, content)
        for name in body.get("competitionDataSources", []):
            shutil.copytree(self.competitions[name], inputs / "competitions" / name)
        for name in body.get("kernelDataSources", []):
            for file, content in service.kernels[name].outputs.items():
                write(inputs / "notebooks" / name / file, content)
        for path in inputs.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)


def unpack(folder, name, content):
    """A file of a dataset as Kaggle shows it: a zip as a folder of its name."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder / name.removesuffix(".zip"))
    else:
        write(folder / name, content)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def places(root):
    """Environment of a session whose /kaggle lies in `root`."""
    scratch = root / "kaggle" / "temp"
    return {
        "VIPR_PLATFORM_ROOT": str(root),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "HOME": str(scratch / "home"),
        "PYTHONPATH": str(ROOT / "tests" / "lanes" / "offline"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "jupyter"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "MPLBACKEND": "Agg",
    }
