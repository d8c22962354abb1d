"""A complete recipe."""

WHOLE = """\
# from a trained network to an artifact
model: {name: resnet20, num_classes: 10}
teacher: {name: resnet56, num_classes: 10, weights: teacher.safetensors}
data: {folder: data/cifar10}
target: {runtime: openvino}
stages:
  - name: distil
    epochs: 30
    clip_norm: 1e-4
    methods: [{soft_targets: {temperature: 3, loss_weight: 0.5}}]
  - name: quantize
    optimizer:
      name: adamw
    methods:
      - ptq:
          bits: 4
"""
