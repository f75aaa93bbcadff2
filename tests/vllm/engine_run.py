"""One vLLM engine in a process of its own: a JSON job on standard input, results in a file.

Job: {"arguments": …, "settings": … or null, "batches": [[request, …], …], "commands": [...]},
a request being {"prompt": [ids], "steering": {…} or null, "tokens": n, "salt": text or null}.
"""

import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams, TokensPrompt

    more = {} if job["settings"] is None else {"additional_config": job["settings"]}
    llm = LLM(**job["arguments"], **more)

    def ask(**asked):
        return json.loads(llm.collective_rpc("fastsae", args=(json.dumps(asked),))[0])

    outputs, counters = [], []
    for batch in job["batches"]:
        prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in batch]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=r["tokens"],
                ignore_eos=True,
                extra_args=r["steering"] and {"fastsae": json.dumps(r["steering"])},
            )
            for r in batch
        ]
        done = llm.generate(prompts, params, use_tqdm=False)
        outputs.append([list(each.outputs[0].token_ids) for each in done])
        reasons = [each.outputs[0].finish_reason for each in done]
        cached = [each.num_cached_tokens for each in done]
        counters.append({"cached": cached, "reasons": reasons})
    result = {"outputs": outputs, "counters": counters}
    if job["settings"] is not None:
        result["answers"] = [ask(**command) for command in job.get("commands", [])]
        result["status"] = ask(do="status")
    if not job["arguments"]["disable_log_stats"]:
        metrics = {each.name: getattr(each, "value", None) for each in llm.get_metrics()}
        result["preemptions"] = metrics["vllm:num_preemptions"]
    with open(job["result"], "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
