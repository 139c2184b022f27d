"""A Ray cluster of several nodes on one machine, in a process of its own: orders come by lines of standard input.

`add` starts a node and prints its raylet's process; `quit` ends all. The first line printed is the address.
"""

import sys


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20})
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        print(node.all_processes["raylet"][0].process.pid, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
