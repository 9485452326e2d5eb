"""The machinery behind `dllm_rl.sandbox`: workers, their isolation, and what runs inside them.

    the caller's process            pool.py, isolation.py     asks, and compares values with what is expected
      a worker, per processor       zygote.py                 process 1 of its namespaces; forks, waits, cleans up
        a tester, per program       tester.py                 runs the tests; never the program
          the program's process     program.py                runs the program; never sees a test or the nonce

Workers import nothing but this folder (`codec.py` is shared) and the standard library.
"""
