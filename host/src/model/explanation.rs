//! Codes with their meaning and the reaction to them. `oncely explain` prints these tables.

/// A code, as it is shown, with its meaning and the reaction to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explanation {
    /// The stable name.
    pub code: &'static str,
    /// The meaning, as one sentence or more.
    pub meaning: &'static str,
    /// The next step.
    pub action: &'static str,
}

/// Defines an enum of codes: for each variant its code, its meaning and the reaction. So no code
/// exists without an explanation.
macro_rules! codes {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $name:ident {
            $($variant:ident: $code:literal, $meaning:literal, $action:literal;)+
        }
    ) => {
        $(#[$attribute])*
        $visibility enum $name {
            $(#[doc = $meaning] $variant,)+
        }

        impl $name {
            /// All of them, in the order of the reference.
            $visibility const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The public name, which is stable.
            $visibility fn as_str(self) -> &'static str {
                self.explanation().code
            }

            /// The meaning, and the reaction.
            $visibility fn explanation(self) -> $crate::model::explanation::Explanation {
                match self {
                    $($name::$variant => $crate::model::explanation::Explanation {
                        code: $code,
                        meaning: $meaning,
                        action: $action,
                    },)+
                }
            }
        }
    };
}
pub(crate) use codes;
