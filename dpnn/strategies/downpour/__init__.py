"""Downpour SGD (Dean et al. 2012, section 4.1): servers hold the parameters, replicas fetch and push when they like.

protocol  what passes between them, and which server holds what
worker    a replica's side: the strategy that its executor calls
parts     what the parts of a replica tell one another
server    a shard of the parameters: applies pushes, answers fetches
ledger    which lanes of the data were leased to whom, and how far their gradients have come
order     the order of arrival at a server, written and read again
cut       a checkpoint while the run goes on
"""
