"""Where chunks run: in this process, in processes of this machine, on Ray. One contract (base.py) for all."""
