"""Run by test_cli_rows.py: flax-vlm as one of several processes, where JAX finds no cluster by itself."""

import sys

import jax

from flax_vlm import cli, parallel

if __name__ == "__main__":
    address, processes, process, devices, *arguments = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        parallel.start_processes(address, int(processes), int(process))
    sys.exit(cli.main(arguments))
