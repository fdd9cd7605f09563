"""The index over HTTP, asked by real clients over loopback."""

import http.client
import json
import shutil
import socket
import struct
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
from roots import picture
from test_index import drawn, encoder  # noqa: F401
from test_page import browser  # noqa: F401

from vipr_utils.retrieve.index import Index
from vipr_utils.retrieve.labels import Confidence, Judge

uvicorn = pytest.importorskip("uvicorn")
serve = pytest.importorskip("vipr_utils.run.serve")


def jpeg(seed=0, height=60, width=80) -> bytes:
    return cv2.imencode(".jpg", picture(seed, height, width))[1].tobytes()


class Client:
    """One connection to a service."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers):
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None


@pytest.fixture(scope="module")
def judged(encoder, tmp_path_factory):  # noqa: F811
    """The folder of an index of the products a to d that says how sure it is."""
    rows, vectors = drawn([f"{letter}{i}" for letter in "abcd" for i in (0, 1)])
    judge = Judge(Confidence([0.0, 2.0, 1.0], -1.0), Confidence([0.0, 1.0, 0.0], 0.0), 0.5)
    folder = tmp_path_factory.mktemp("judged") / "index"
    return Index.build(folder, encoder, rows, vectors, judge=judge).folder


@pytest.fixture
def port(judged, tmp_path):
    """Of a service with an index of its own."""
    index = Index(shutil.copytree(judged, tmp_path / "index"))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(serve.app(index), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def test_photo_is_added_found_and_removed(port, tmp_path):
    client = Client(port)
    assert client.ask("GET", "/healthz") == (200, {"version": 1, "photos": 8, "products": 4})
    code, state = client.ask("POST", "/products?product=milk/red&photo=m1&domain=customer", jpeg(1))
    assert code == 201 and state == {"version": 2, "photos": 9, "products": 5}
    code, found = client.ask("POST", "/search?k=3", jpeg(1))
    assert code == 200 and found["product"] == "milk/red" and len(found["answers"]) == 3
    assert found["there"] is True and 0.5 < found["confidence"] < 1
    first = found["answers"][0]
    assert first["photo"] == "m1" and first["rank"] == 1 and first["similarity"] > 0.999
    assert len(Index(tmp_path / "index")) == 9
    code, state = client.ask("DELETE", "/products/milk/red")
    assert code == 200 and state["photos"] == 8
    assert client.ask("DELETE", "/products/milk/red")[0] == 404
    for letter in "abc":
        assert client.ask("DELETE", f"/products/{letter}")[0] == 200
    assert client.ask("DELETE", "/products/d")[0] == 409


def test_update_of_another_process_is_answered_by(port, tmp_path):
    other = Index(tmp_path / "index")
    content = jpeg(5)
    rows, _ = drawn(["z0"])
    other.put(rows, other.embed([content])[0])
    code, found = Client(port).ask("POST", "/search", content)
    assert code == 200 and found["answers"][0]["photo"] == "z0"


def test_openapi_page_loads_nothing_from_elsewhere(port, browser):  # noqa: F811
    tab, asked, home = browser.new_page(), [], f"http://127.0.0.1:{port}/"
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(home + "docs")
    tab.wait_for_selector('[data-path="/products/{name}"]')
    tab.close()
    assert [url for url in asked if not url.startswith(("data:", home))] == []
    assert home + "openapi.json" in asked


def bomb() -> bytes:
    """A PNG of few bytes that says it has 400 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checked

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def wide() -> bytes:
    """A real PNG of 60 megapixels in one colour."""
    return cv2.imencode(".png", np.zeros((6_000, 10_000), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    "body, codes",
    [
        (b"", [400]),
        (b"no photo", [400]),
        (jpeg()[:300], [400]),
        (b"\xff\xd8" + bytes(1000), [400]),
        (bomb(), [400, 413]),
        (wide(), [413]),
        (bytes(serve.MOST_BYTES + 1), [413]),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            [400],
        ),
    ],
)
def test_hostile_bodies_are_refused_and_the_service_lives(port, body, codes):
    for path in ("/search", "/products?product=a&photo=b"):
        try:
            code, answer = Client(port).ask("POST", path, body)
        except (BrokenPipeError, ConnectionResetError):  # it hung up on what is too large
            code, answer = 413, {"detail": ""}
        assert code in codes and isinstance(answer["detail"], str)
    assert Client(port).ask("GET", "/healthz")[1]["photos"] == 8
    assert Client(port).ask("POST", "/search", jpeg())[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/search?k=0",
        "/search?k=1000",
        "/search?k=x",
        "/products?product=a",
        "/products?product=&photo=b",
        "/products?product=a&photo=b&domain=moon",
        "/products?product=a%00&photo=b",
        f"/products?product={'a' * 300}&photo=b",
    ],
)
def test_wrong_parameters_are_refused(port, path):
    assert Client(port).ask("POST", path, jpeg())[0] == 422


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "C:%5Cx", "a%00b"]
)
def test_names_never_reach_the_file_system(port, tmp_path, name):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert Client(port).ask("DELETE", f"/products/{name}")[0] == 404
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert Client(port).ask("POST", f"/products?product={name}&photo={name}", jpeg())[0] in (
        201,
        422,
    )
    inside = {path.parent.name for path in tmp_path.rglob("*") if path.is_file()}
    assert inside <= {"index", "versions", "parts"}


def test_many_clients_lose_no_update(port, tmp_path):
    errors, seconds = [], []

    def client(number: int) -> None:
        mine = Client(port)
        for turn in range(4):
            name = f"c{number}-{turn}"
            content = jpeg(100 + 10 * number + turn)
            start = time.perf_counter()
            code, _ = mine.ask("POST", f"/products?product={name}&photo={name}", content)
            found = mine.ask("POST", "/search?k=1", content)
            seconds.append(time.perf_counter() - start)
            if code != 201 or found[1]["answers"][0]["photo"] != name:
                errors.append((code, found))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(seconds) == 32
    held = set(Index(tmp_path / "index").version.rows["photo"])
    assert {f"c{number}-{turn}" for number in range(8) for turn in range(4)} <= held


def test_client_that_hangs_up_or_dawdles_stops_nobody(port, monkeypatch):
    monkeypatch.setattr(serve, "BODY_S", 0.5)
    for sent in (b"", jpeg()[:200]):
        half = socket.create_connection(("127.0.0.1", port))
        half.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + sent)
        if sent:
            half.close()
            continue
        half.settimeout(10)
        assert b"408" in half.recv(100)
    assert Client(port).ask("POST", "/search", jpeg())[0] == 200


def test_document_names_every_answer(port):
    code, document = Client(port).ask("GET", "/openapi.json")
    assert code == 200
    assert set(document["paths"]) == {"/healthz", "/search", "/products", "/products/{name}"}
    assert {"200", "400", "408", "413", "422", "503"} <= set(
        document["paths"]["/search"]["post"]["responses"]
    )


def test_requests_drawn_from_its_own_document_are_answered_as_it_says(port):
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    tried = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(max_examples=20, deadline=None, database=None)
        @hypothesis.given(case=operation.as_strategy())
        def answered(case):
            nonlocal tried
            case.call_and_validate()
            tried += 1

        answered()
    assert tried >= 40
    assert Client(port).ask("POST", "/search", jpeg())[0] in (200, 409)
