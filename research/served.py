"""How many questions a running llama.cpp server answers, such as a stock one with a folded file.

    python research/served.py --url http://127.0.0.1:8080 --contexts 3 [task options as of search]

Waits until it has loaded. Asks its `/completion` for greedy answers to test contexts, one question after the other, so
that its cache serves a context's questions. Prompts are plain text, without a chat template.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from urllib.error import HTTPError

from options import add_task_options, task_of


def completion(url: str, prompt: str, n_predict: int) -> str:
    body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0.0, "cache_prompt": True}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(request, timeout=600) as reply:
                return str(json.loads(reply.read())["content"])
        except HTTPError as error:
            if error.code != 503:  # it is still loading
                raise
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the server, without a path")
    parser.add_argument("--contexts", metavar="N", type=int, default=3, help="test contexts (%(default)s)")
    parser.add_argument("--predict", metavar="N", type=int, default=12, help="tokens of an answer (%(default)s)")
    add_task_options(parser)
    args = parser.parse_args()
    config = task_of(args)
    task = config.make()
    lead = task.calibration().lead.removeprefix(config.answer_prefix)
    right = asked = 0
    for i in range(args.contexts):
        context = task.context("test", i)
        for probe in context.probes:
            answer = completion(args.url, context.prefix + probe.question + config.answer_prefix, args.predict)
            right += answer.removeprefix(lead).startswith(probe.answer)
            asked += 1
        print(f"{right} of {asked} right after {i + 1} contexts", flush=True)


if __name__ == "__main__":
    main()
