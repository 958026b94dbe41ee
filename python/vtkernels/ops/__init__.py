"""One module a family: the public function, its docstring, its fake (meta) kernel and its autograd."""
