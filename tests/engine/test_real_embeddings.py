"""Embeddings of the real SGLang: the development model, started with `task = "embed"`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serve import MODEL_ID

from appliance.serving.self_test import PROMPT
from appliance.verifier.transport import verified_client
from appliance.verifier.verdict import Outcome
from appliance.wire.output import Embeddings, decode_embeddings
from tests.engine.conftest import RealAppliance, require_engine, start_real_appliance, stop

pytestmark = pytest.mark.engine

TEXTS = ["The capital of France is Paris.", "Paris is a city in France.", "SELECT 1 FROM t;"]


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealAppliance]:
    require_engine()
    appliance = start_real_appliance(tmp_path_factory.mktemp("embedding"), task="embed")
    yield appliance
    status = stop(appliance)
    assert status == 0, appliance.log()[-3000:]


def told(appliance: RealAppliance, event: str) -> dict[str, Any]:
    lines = (json.loads(line) for line in appliance.log().splitlines() if line.startswith("{"))
    return next(line for line in lines if line.get("event") == event)


def ask(appliance: RealAppliance, **body: Any) -> Embeddings:
    with appliance.client() as client:
        response = client.post("/v1/embeddings", json={"model": MODEL_ID, **body})
    assert response.status_code == 200, response.text
    return decode_embeddings(response.content)


def test_numbers_and_base64_are_the_same_binary32(embedding: RealAppliance) -> None:
    numbers = ask(embedding, input=TEXTS, encoding_format="float")
    text = ask(embedding, input=TEXTS, encoding_format="base64")
    assert all(isinstance(one, list) for one in numbers.told)
    assert all(isinstance(one, str) for one in text.told)
    assert numbers.vectors() == text.vectors()
    assert numbers.digest == text.digest
    assert numbers.usage == text.usage


def test_the_openai_package_gets_one_vector_for_one_text_and_its_receipt_holds(
    embedding: RealAppliance,
) -> None:
    seen: list[Outcome] = []
    http = verified_client(
        embedding.url,
        policy=embedding.folder / "policy.toml",
        accept="unsafe_warning",
        on_verified=seen.append,
    )
    with openai.OpenAI(
        base_url=f"{embedding.url}/v1", api_key="unused", max_retries=0, http_client=http
    ) as client:
        first = client.embeddings.create(model=MODEL_ID, input=TEXTS)
        second = client.embeddings.create(model=MODEL_ID, input=TEXTS)
    assert first.model == MODEL_ID
    assert first.usage.prompt_tokens == first.usage.total_tokens > 0
    assert [one.embedding for one in first.data] == [one.embedding for one in second.data]
    vectors = [one.embedding for one in first.data]
    assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-3) for vector in vectors)
    likeness = [
        sum(one * other for one, other in zip(vectors[0], vector, strict=True))
        for vector in vectors[1:]
    ]
    assert likeness[0] > likeness[1]
    assert len(seen) == 3  # the appliance, and each answer


def test_the_boot_embedded_one_text_twice_and_logged_its_digest(embedding: RealAppliance) -> None:
    digest = told(embedding, "deterministic")["output"]
    assert digest == "sha256:" + ask(embedding, input=PROMPT).digest.hex()


def test_chat_is_refused_here_and_embeddings_elsewhere(embedding: RealAppliance) -> None:
    with embedding.openai() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "Hello"}]
        )
    assert (refused.value.code, refused.value.param) == ("unsupported_feature", "model")


def test_a_text_has_one_vector_alone_and_among_others(embedding: RealAppliance) -> None:
    together = ask(embedding, input=[*TEXTS, " ".join(["many words"] * 500)]).vectors()
    assert [ask(embedding, input=text).vectors()[0] for text in TEXTS] == list(together[:3])


def test_a_token_that_the_model_has_not_is_refused_and_the_engine_lives(
    embedding: RealAppliance,
) -> None:
    with embedding.openai() as client:
        for given in ([70_000], [[1], [2, 70_000]]):
            with pytest.raises(openai.BadRequestError, match="token ids below 49152"):
                client.embeddings.create(model=MODEL_ID, input=given)
    assert ask(embedding, input=[49_151]).vectors()
