module {{name}}

go 1.25

require (
	go.bytecodealliance.org/pkg v0.2.3
	oncely v0.0.0
)

replace oncely => ./oncely
