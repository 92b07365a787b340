"""A run's merged model behind an endpoint like OpenAI's completions.

The endpoint is that of platform.openai.com, "Create completion". There are two Ray Serve
deployments. One answers HTTP and refuses requests that are too large. The other holds the model and
takes one request at a time. Prompts and answers are never logged. Ray's token does not guard
Serve's port. So the default is to listen on 127.0.0.1, and any other address belongs behind a
gateway that knows its users.
"""

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from pipelines.config.schema import ModelConfig, Section

APPLICATION, GENERATOR = "ray-unlearn", "Generator"
# FastAPI's documentation pages would load scripts from other hosts.
HTTP = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


class Settings(Section):
    """The model and its limits: the arguments of `build_app` in a Serve configuration."""

    run_dir: str = Field(description="The output_dir of a finished run.")
    max_tokens: int = Field(default=512, ge=1, description="Tokens of an answer, at most.")
    max_queue: int = Field(
        default=32, ge=0, description="Requests that wait while one is answered, at most."
    )
    max_body_bytes: int = Field(default=64 * 1024, ge=1, description="Size of a request, at most.")
    gpus: float = Field(default=0, ge=0, description="GPUs for the model; 0 answers on a CPU.")

    @property
    def model(self) -> ModelConfig:
        """Return the merged model's folder."""
        return ModelConfig(path=str(Path(self.run_dir) / "model"))

    @property
    def name(self) -> str:
        """Return the name of the model in requests."""
        return Path(self.run_dir).name


class Completion(BaseModel):
    """A request: those of OpenAI's parameters that are implemented."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class RefusalError(Exception):
    """A request is not answered. It has the HTTP status, and a message that helps the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def response(self) -> JSONResponse:
        """Return the refusal in the form of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return JSONResponse({"error": {"message": self.message, "type": kind}}, self.status)


async def read_body(http: Request, limit: int) -> bytes:
    """Read a request's body, no further than the limit.

    Raises:
        RefusalError: the body is larger.
    """
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit:
            raise RefusalError(413, f"body: found more than {limit} bytes, allowed: {limit}")
    return bytes(body)


def parse(body: bytes, settings: Settings) -> Completion:
    """Parse a request and check its limits.

    Raises:
        RefusalError: the request is wrong. The message does not hold the prompt.
    """
    try:
        request = Completion.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, fault["loc"])) or "body"
        message = f"{key}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        if fault["type"] == "extra_forbidden":
            message += f", allowed: {', '.join(Completion.model_fields)}"
        raise RefusalError(400, message) from None
    if request.model != settings.name:
        raise RefusalError(404, f"model: found '{request.model}', allowed: '{settings.name}'")
    if request.max_tokens > settings.max_tokens:
        raise RefusalError(
            400, f"max_tokens: found {request.max_tokens}, allowed: up to {settings.max_tokens}"
        )
    return request


@serve.deployment(name=GENERATOR, max_ongoing_requests=1)
class Generator:
    """The model. Only safetensors are loaded, and no code that comes with a model is run."""

    def __init__(self, settings: Settings) -> None:
        from pipelines.encoding.text import load_tokenizer
        from pipelines.model.folder import load_model_config
        from pipelines.model.load import load_base, stop_tokens

        self.context = getattr(
            load_model_config(settings.model, "RUN_DIR"), "max_position_embeddings", None
        )
        self.tokenizer = load_tokenizer(settings.model)
        self.device = "cuda" if settings.gpus else "cpu"
        base: Any = load_base(settings.model, "bf16" if settings.gpus else "fp32")
        self.model = base.to(self.device).eval()
        end: Any = self.tokenizer.eos_token_id
        self.ends = stop_tokens(self.model, [end])

    def complete(self, request: Completion) -> dict[str, Any]:
        """Return the text, why it ended and token counts, or only `refused` with the reason."""
        import torch

        tokens: Any = self.tokenizer(request.prompt, return_tensors="pt").to(self.device)
        prompt_tokens = tokens["input_ids"].shape[1]
        if self.context is not None and prompt_tokens + request.max_tokens > self.context:
            needed = f"{prompt_tokens} tokens of prompt and {request.max_tokens} of answer"
            return {"refused": f"prompt: found {needed}, allowed: {self.context} together"}
        sampling: dict[str, Any] = {"do_sample": request.temperature > 0}
        if request.temperature > 0:
            # transformers draws from the 50 likeliest tokens unless `top_k` is 0. OpenAI from all.
            sampling |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        if request.seed is not None:
            torch.manual_seed(request.seed)
        end: Any = self.tokenizer.eos_token_id
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
                max_new_tokens=request.max_tokens, eos_token_id=self.ends, pad_token_id=end, **sampling,
            )  # fmt: skip
        answer = output[0, prompt_tokens:].tolist()
        ended = bool(answer) and answer[-1] in self.ends
        return {
            "text": self.tokenizer.decode(answer, skip_special_tokens=True),
            "finish_reason": "stop" if ended else "length",
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(answer),
                "total_tokens": prompt_tokens + len(answer),
            },
        }


@serve.deployment(name="Api", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
@serve.ingress(HTTP)  # copies HTTP and all it uses at once, which must be defined above
class Api:
    """The HTTP side: limits, errors and the form of answers."""

    def __init__(self, generator: DeploymentHandle, settings: Settings) -> None:
        self.generator, self.settings = generator, settings

    @HTTP.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """Answer 200 while the model can complete prompts, and 503 otherwise."""
        # `serve.status` blocks, and the event loop must not.
        status = await asyncio.to_thread(serve.status)
        state = status.applications[APPLICATION].deployments[GENERATOR].status
        return JSONResponse(
            {"model": self.settings.name, "status": state}, 200 if state == "HEALTHY" else 503
        )

    @HTTP.post("/v1/completions")
    async def completions(self, http: Request) -> JSONResponse:
        """Complete a prompt."""
        try:
            request = parse(await read_body(http, self.settings.max_body_bytes), self.settings)
            try:
                done = await self.generator.complete.remote(request)
            except BackPressureError:
                limit = self.settings.max_queue
                raise RefusalError(
                    503, f"queue: full, allowed: {limit} waiting requests; try again later"
                ) from None
            if "refused" in done:
                raise RefusalError(400, done["refused"])
        except RefusalError as refusal:
            return refusal.response()
        choice = {
            "index": 0,
            "text": done["text"],
            "logprobs": None,
            "finish_reason": done["finish_reason"],
        }
        return JSONResponse(
            {
                "id": f"cmpl-{uuid.uuid4().hex}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": request.model,
                "choices": [choice],
                "usage": done["usage"],
            }
        )


def build_app(settings: Settings) -> serve.Application:
    """Return the application. A Serve configuration names it `deploy.serve:build_app`.

    The configuration's `args` are the fields of Settings.
    """
    generator = Generator.options(
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus},
    ).bind(settings)
    return Api.bind(generator, settings)
