"""A Flower client in the manner of FlowerTune: it takes the adapter's arrays, trains LoRA in PEFT, and returns the arrays.

Ray's workers import this file.
"""

from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from speed_parts.task import Task, padded, peft_model, trainable


@lru_cache(maxsize=1)
def _task(path: str) -> Task:
    torch.set_num_threads(1)
    return Task.load(path)


@lru_cache(maxsize=1)
def _kept_model(path: str) -> Any:
    return peft_model(_task(path))


def make_client_app(path: str, *, keeps_model: bool) -> ClientApp:
    """Returns the app whose node `partition-id` is that client of the task at `path`.

    FlowerTune's client loads the model for each message; with `keeps_model` a process of Ray loads it once.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = _task(path)
        model = _kept_model(path) if keeps_model else peft_model(task)
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        input_ids, labels = padded(task, int(context.node_config["partition-id"]))
        optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)  # one step of it is minus the gradient
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        arrays = ArrayRecord(get_peft_model_state_dict(model, save_embedding_layers=False))
        metrics = MetricRecord({"num-examples": len(input_ids)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app
