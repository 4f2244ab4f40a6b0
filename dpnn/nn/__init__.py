"""What a network is: layers and how they are put together. Descriptions only, no arrays and no MPI."""

from dpnn.nn.chain import Branches, Chain, Network
from dpnn.nn.conv import Conv
from dpnn.nn.dense import Dense
from dpnn.nn.graph import Graph, Node, Param
from dpnn.nn.join import Add, Concat, Fork, Heads
from dpnn.nn.layer import Input, Layer, ParamSpec, Shape
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy
from dpnn.nn.norm import BatchNorm, BatchNormalize, BatchSums, LocalResponseNorm
from dpnn.nn.pointwise import Dropout, Flatten, ReLU
from dpnn.nn.pool import AvgPool, GlobalAvgPool, MaxPool

__all__ = [
    "Add",
    "AvgPool",
    "BatchNorm",
    "BatchNormalize",
    "BatchSums",
    "Branches",
    "Chain",
    "Concat",
    "Conv",
    "Dense",
    "Dropout",
    "Flatten",
    "Fork",
    "GlobalAvgPool",
    "Graph",
    "Heads",
    "Input",
    "Layer",
    "LocalResponseNorm",
    "MaxPool",
    "Network",
    "Node",
    "Param",
    "ParamSpec",
    "ReLU",
    "Shape",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
]
