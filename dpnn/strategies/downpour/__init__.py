"""Downpour SGD (Dean et al. 2012, section 4.1): servers hold the parameters, replicas fetch and push when they like.

protocol  what passes between them, and which server holds what
worker    a replica's side: the strategy that its executor calls; with `parts`, what its parts tell one another
links     its lines to who holds the shards (each a `link`), and what it does where one of those dies
shard     a shard of the parameters, and all that changes it: what a server and its mirror do alike; with `copies`
ledger    which lanes of the data were leased to whom, and how far their gradients have come
server    serving one shard, over the `lines` to its workers; `roll`: who of them has spoken when
mirror    what passes from who holds a shard to its mirror
host      a server's process: its own shard, shadows of others', those that it took over; `holders`: who holds which
cut       what the servers do together: a checkpoint while the run goes on (with `fork`), the settling of losses
order     the order of arrival at a server, written and read again
"""
