"""Asks a served pair by the official client, and prints the answer as it comes: `python ask.py URL PROMPT`.

URL is what `pdtrim serve` prints, such as http://127.0.0.1:8100/v1.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str, prompt: str) -> None:
    """Raises: openai.OpenAIError for what the engines refuse."""
    client = OpenAI(base_url=url, api_key="none is asked for")
    (model,) = client.models.list()
    for part in client.completions.create(model=model.id, prompt=prompt, max_tokens=64, temperature=0, stream=True):
        print(part.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
