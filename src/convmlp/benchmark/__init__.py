"""How fast models infer, train and load their pictures on this machine. `convmlp benchmark`.

Each variant of a model works in a process of its own (`worker`), for the threads of some runtimes keep spinning after
a call and slow down whatever else their process does. The processes take turns (`turns`), so that whatever else goes
on in the machine falls on all of them alike.
"""
