"""The fully connected layer."""

from dataclasses import dataclass

from dpnn.nn.layer import Layer, ParamSpec, Shape


@dataclass(frozen=True)
class Dense(Layer):
    """`units` weighted sums of all inputs: (C,) -> (units,). Parameters: weight (units, C), bias (units,)."""

    units: int
    bias: bool = True

    def infer(self, *shapes: Shape) -> Shape:
        if len(shapes) != 1 or len(shapes[0]) != 1:
            raise self._misfit(shapes, "a vector (C,): put Flatten() before it")
        if self.units < 1:
            raise self._error(f"units = {self.units}; use 1 or more")
        return (self.units,)

    def params(self, *shapes: Shape) -> dict[str, ParamSpec]:
        (channels,) = shapes[0]
        specs = {"weight": ParamSpec((self.units, channels), "he", channels, decay=True)}
        if self.bias:
            specs["bias"] = ParamSpec((self.units,), "zeros")
        return specs
