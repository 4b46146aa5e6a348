"""A reward that is a Python function. Name it in YAML or on the command line:

    python -m rlhf_lightning fit --config ppo.yaml --data.path prompts.jsonl \
        --model.reward rlhf_lightning.rewards.FunctionReward \
        --model.reward.function examples/custom_reward_function.py:brevity

The function gets the prompts as the user wrote them and the responses without special tokens. It gets other columns of
the rows if it has a parameter of that name. It returns one number per response. A wrong length or a NaN stops the run.
"""


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for an empty answer, minus a tenth for every word."""
    return [1.0 - 0.1 * len(response.split()) for response in responses]


def mentions_keyword(prompts: list[str], responses: list[str], keyword: list[str]) -> list[float]:
    """1 where the answer has the word in the row's ``keyword`` column: {"prompt": ..., "keyword": "Paris"}."""
    return [float(word.lower() in response.lower()) for word, response in zip(keyword, responses, strict=True)]
