"""The engine's compute on CPUs: kernels in C++, built once a machine, called through ctypes."""
