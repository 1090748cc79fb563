"""KerasHub's `run_backbone_test` and `run_task_test` on compressed models."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import keras
import keras_hub
from absl.testing import parameterized
from keras import ops

import keras_distilled_embedding as kde
from tests.architectures import ARCHITECTURES
from tests.architectures import Architecture
from tests.peers.adapt import FOLDER


def load_test_case() -> Any:
    """KerasHub's test case, which is no part of what is installed."""
    path = FOLDER / "test_case.py"
    spec = importlib.util.spec_from_file_location("kerashub_test_case", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.TestCase


class Students:
    """In the place of a class of KerasHub: what it makes is compressed."""

    def __init__(self, cls: type[keras.Model]) -> None:
        self.cls = cls
        self.__name__ = cls.__name__

    def __call__(self, **options: Any) -> keras.Model:
        return kde.compress(self.cls(**options), rank=3, verbose=0)

    def from_config(self, config: dict[str, Any]) -> keras.Model:
        return kde.compress(self.cls.from_config(config), rank=3, verbose=0)


def backbone_options(architecture: Architecture) -> dict[str, Any]:
    """Arguments of its backbone."""
    backbone = architecture.make()
    backbone = getattr(backbone, "backbone", backbone)
    config = backbone.get_config()
    config = {
        k: v
        for k, v in config.items()
        if k not in ("name", "trainable", "dtype")
    }
    return config


class KerasHubTest(load_test_case()):
    def run_student_saving_test(self, model):
        """In the place of a round trip of its configuration."""
        self.assertRaisesRegex(ValueError, "save_model", model.get_config)
        path = os.path.join(self.get_temp_dir(), "student.keras")
        kde.save_model(model, path)
        loaded = kde.load_model(path)
        self.assertIs(type(loaded), type(model))
        self.assertLen(loaded.weights, len(model.weights))
        for left, right in zip(loaded.weights, model.weights):
            self.assertEqual(left.name, right.name)
            self.assertAllEqual(left, right)

    @parameterized.named_parameters((a.name, a) for a in ARCHITECTURES)
    def test_backbone(self, architecture):
        cls = getattr(keras_hub.models, architecture.backbone)
        options = backbone_options(architecture)
        backbone = cls(**options)
        batch = {
            name: ops.convert_to_tensor(values)
            for name, values in architecture.inputs().items()
            if name in backbone.input
        }
        shapes = keras.tree.map_structure(lambda x: x.shape, backbone(batch))
        self.run_backbone_test(
            cls=Students(cls),
            init_kwargs=options,
            input_data=batch,
            expected_output_shape=shapes,
        )
