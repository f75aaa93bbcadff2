"""Bodies of requests. A field that is unknown, or known and not served, is refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SEED_BITS = 63
STRENGTH = 100.0  # times what the policy says


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Steering(Strict):
    """{"policy": "name@version" | "name", "strength": 1.0}: the same field in every engine."""

    policy: str = Field(min_length=1)
    strength: float = Field(default=1.0, ge=-STRENGTH, le=STRENGTH)


class StreamOptions(Strict):
    include_usage: bool = False


class Request(Strict):
    """What both completions share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-(2**SEED_BITS), lt=2**SEED_BITS)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    steering: Steering | None = None
    # Accepted at the values that change nothing: clients send them unasked.
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(default=None, max_length=0)
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero(cls, given: Any) -> Any:
        return 0 if isinstance(given, float) and given == 0 else given

    @field_validator("stop")
    @classmethod
    def _stops(cls, given: str | list[str] | None) -> list[str]:
        listed = [given] if isinstance(given, str) else given or []
        if len(listed) > 16 or not all(listed):
            raise ValueError("expected at most 16 strings, none of them empty")
        return listed

    @model_validator(mode="after")
    def _options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        return self.stop or []


class Completion(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        given = self.content
        return given if isinstance(given, str) else "".join(part.text for part in given)


class ChatCompletion(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: "TextFormat | None" = None
    parallel_tool_calls: bool | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextFormat(Strict):
    type: Literal["text"]


ChatCompletion.model_rebuild()
