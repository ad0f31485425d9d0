"""The operators, a folder each: specification, declaration, public function, and one module a backend."""
