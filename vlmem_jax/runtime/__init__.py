"""What programs run on and under: the mesh, the hosts, the compiler, and the few shapes that there are."""
