"""A catalogue index over HTTP: `vipr index serve INDEX`, by FastAPI and uvicorn (extra `serve`).

    curl --data-binary @photo.jpg http://127.0.0.1:8000/search
    curl --data-binary @shop.jpg "http://127.0.0.1:8000/products?product=milk&photo=milk/1.jpg"
    curl -X DELETE http://127.0.0.1:8000/products/milk

Photos come as the body of a request, never as a path. It answers this machine alone unless it is
told otherwise, and knows no users: what stands in front of it decides who may ask.
"""

import asyncio
import queue
import socket
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Annotated

import numpy as np
import pandas as pd
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse
from pydantic import BaseModel

from vipr_utils.data.store import BrokenImage, picture_size
from vipr_utils.retrieve.index import COLUMNS, Index

MOST_BYTES = 20_000_000  # of a photo
MOST_PIXELS = 50_000_000
MOST_ANSWERS = 100
BODY_S = 30  # to send a photo in
TOGETHER = 16  # photos that are embedded at once
WAITING = 256  # photos that may wait for their turn

NAME = Query(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")
PHOTO = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class Answer(BaseModel):
    """A gallery photo."""

    rank: int
    photo: str
    product: str
    group: str
    domain: str
    similarity: float


class Found(BaseModel):
    """What a photo shows, and the gallery photos nearest to it."""

    product: str
    confidence: float | None = None
    there: bool | None = None
    answers: list[Answer]


class State(BaseModel):
    """The version that answers."""

    version: int
    photos: int
    products: int


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: str


def problems(*codes: int) -> dict:
    """For the OpenAPI document."""
    return {code: {"model": Problem} for code in codes}


class Desk:
    """One thread that answers; photos that wait together are embedded together."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.waiting: queue.Queue = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def ask(self, content: bytes, k: int) -> Future:
        """Of a Found. Raises queue.Full where too many wait."""
        answer = Future()
        self.waiting.put_nowait((content, k, answer))
        return answer

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()

    def _serve(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while len(batch) < TOGETHER and not self.waiting.empty():
                following = self.waiting.get()
                if following is None:
                    self.waiting.put(None)
                    break
                batch.append(following)
            contents, counts, answers = zip(*batch)
            try:
                self.index.reload()
                found = self._found(list(contents), counts)
            except Exception as error:  # whatever it is, those who wait must hear of it
                found = [error] * len(batch)
            for answer, value in zip(answers, found):
                if isinstance(value, Exception):
                    answer.set_exception(value)
                else:
                    answer.set_result(value)

    def _found(self, contents: list[bytes], counts: tuple[int, ...]) -> list:
        """A Found or a BrokenImage for each photo."""
        answers = self.index.search(contents, k=max(counts))
        products = answers.products.replace(np.nan, None).set_index("query")
        found = []
        for number, k in enumerate(counts):
            if number in answers.problems.index:
                found.append(BrokenImage(answers.problems["problem"][number]))
                continue
            rows = answers.lists[answers.lists["query"] == number].head(k)
            told = products.loc[number].to_dict()
            found.append(Found(**told, answers=rows.to_dict("records")))
        return found


async def _photo(request: Request) -> bytes:
    """The body. Raises HTTPException for one that is too large, too slow, or no photo."""

    async def read() -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"a photo has {MOST_BYTES:,} bytes at most")
        return bytes(content)

    try:
        content = await asyncio.wait_for(read(), BODY_S)
        width, height = picture_size(content)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"a photo must arrive within {BODY_S} seconds") from None
    except BrokenImage as error:
        raise HTTPException(400, str(error)) from error
    if width * height > MOST_PIXELS:
        raise HTTPException(
            413, f"a photo has {MOST_PIXELS:,} pixels at most, got {width}x{height}"
        )
    return content


class Service:
    """The requests that an index answers; one of them at a time changes it."""

    def __init__(self, index: Index) -> None:
        self.index, self.desk = index, Desk(index)
        self.writing = threading.Lock()

    def state(self) -> State:
        """Which version answers, and how much it holds."""
        version = self.index.version
        products = version.rows["product"].nunique()
        return State(version=version.number, photos=len(version.rows), products=products)

    async def search(
        self, request: Request, k: Annotated[int, Query(ge=1, le=MOST_ANSWERS)] = 5
    ) -> Found:
        """The products that a customer's photo shows, best first."""
        content = await _photo(request)
        try:
            return await asyncio.wrap_future(self.desk.ask(content, k))
        except queue.Full:
            raise HTTPException(503, "too many photos wait: try again") from None
        except BrokenImage as error:
            raise HTTPException(400, str(error)) from error

    async def add(
        self,
        request: Request,
        product: Annotated[str, NAME],
        photo: Annotated[str, NAME],
        group: Annotated[str, Query(max_length=200)] = "",
        domain: Annotated[str, Query(pattern="^(shop|customer)?$")] = "shop",
    ) -> State:
        """Add a photo of a product; one of the same name gives way to it."""
        content = await _photo(request)
        row = dict(zip(COLUMNS, (photo, product, group, domain)))
        return await asyncio.to_thread(self._added, row, content)

    def _added(self, row: dict, content: bytes) -> State:
        with self.writing:
            vectors, broken = self.index.embed([content], row["domain"] == "customer")
            if len(broken):
                raise HTTPException(400, broken["problem"].iloc[0])
            self.index.put(pd.DataFrame([row]), vectors)
            return self.state()

    def remove(self, name: str) -> State:
        """Remove all photos of a product."""
        with self.writing:
            self.index.reload()
            here = self.index.version.rows["product"]
            if name not in set(here):
                raise HTTPException(404, f"no product {name!r} is here")
            if here.nunique() == 1:
                raise HTTPException(409, "it is the last product: an index cannot be empty")
            self.index.remove([name])
            return self.state()


def app(index: Index) -> FastAPI:
    """The service of an index."""
    service = Service(index)

    @asynccontextmanager
    async def lifespan(_):
        yield
        service.desk.close()

    settings = {"docs_url": None, "redoc_url": None}  # those load scripts from elsewhere
    api = FastAPI(title="ViPR index", description=__doc__, lifespan=lifespan, **settings)
    _add_docs(api)
    api.get("/healthz")(service.state)
    photo = {"openapi_extra": PHOTO}
    api.post("/search", responses=problems(400, 408, 413, 503), **photo)(service.search)
    api.post("/products", status_code=201, responses=problems(400, 408, 413), **photo)(service.add)
    api.delete("/products/{name:path}", responses=problems(404, 409))(service.remove)
    return api


def _add_docs(api: FastAPI) -> None:
    """The OpenAPI page at /docs, with its script and style from an installed package."""
    files = resources.files("fastapi_offline") / "static"
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        answer = partial(_file, str(files / name))
        api.add_route(f"/docs/{name}", answer, include_in_schema=False)
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=api.title,
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    api.add_route("/docs", lambda _: page, include_in_schema=False)


def _file(path: str, _: Request) -> FileResponse:
    return FileResponse(path)


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address, at any free port for 0. Raises OSError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind((host, port))
    opened.listen(WAITING)  # whoever calls before the service has started waits
    return opened


def serve(index: Index, opened: socket.socket) -> None:
    """Until Ctrl-C."""
    uvicorn.Server(uvicorn.Config(app(index), log_level="warning")).run(sockets=[opened])
