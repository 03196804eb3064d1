//! What must have happened in a campaign before it may say that a mutant was not caught: otherwise it proves nothing.

use oncely::fault;
use support::proxy::Cut;

use crate::campaign::Act;
use crate::workload::{Nature, Often};

/// What a mutant cannot survive unseen.
#[derive(Debug, Clone, Default)]
pub struct Exposure {
    /// What is done to the host, and how often at least.
    pub acts: Vec<(Act, u64)>,
    /// What is published far more often than usual, and how often at least.
    pub often: Option<(Often, u64)>,
    /// How often ids of outputs are taken by a stranger before these are published.
    pub taken_ids: u64,
    /// How often the mutant has to have done harm that it knows of. The acts go on until then.
    pub harm: u64,
}

impl Exposure {
    /// What exposes a mutant; none for one that no campaign is made for. The host as it is (`none`) goes through the acts
    /// of all of them.
    pub fn for_mutant(mutant: &str) -> Option<Exposure> {
        let acts = |acts: &[(Act, u64)]| Exposure {
            acts: acts.to_vec(),
            ..Exposure::default()
        };
        let often = |often, times| Exposure {
            often: Some((often, times)),
            ..Exposure::default()
        };
        Some(match mutant {
            // What is in flight when a host dies is gone.
            fault::ACK_BEFORE_COMMIT | fault::INBOX_IN_OWN_TX => acts(&[(Act::Kill, 6)]),
            // The commit did not happen, and succeeds on another connection.
            fault::RESEND_COMMIT => acts(&[(Act::Cut(Cut::CommitNotForwarded), 6)]),
            // The commit happens after the look for it.
            fault::RESOLVE_BY_SELECT => Exposure {
                harm: 2,
                ..acts(&[(Act::Cut(Cut::CommitDelayed), 4)])
            },
            // What was confirmed last is gone with the server, which writes seconds later where it is not waited for.
            fault::SYNCHRONOUS_COMMIT_OFF => acts(&[(Act::StopDatabase, 6)]),
            // Outputs are left behind, to be swept up.
            fault::CURSOR_BY_SEQ => {
                acts(&[(Act::Cut(Cut::OutputsNotForwarded), 4), (Act::Kill, 2)])
            }
            // Outputs are marked and did not arrive.
            fault::MARK_BEFORE_PUBACK | fault::MARK_WITHOUT_FILTER => acts(&[
                (Act::Cut(Cut::OutputsNotForwarded), 5),
                (Act::KillBroker, 2),
            ]),
            // Copies are common enough, and every effect leaves a trace in its session.
            fault::SKIP_CLAIM | fault::NO_SESSION_RESET => Exposure::default(),
            fault::SKIP_RELEASE => often(Often::Nature(Nature::FailsOnce), 20),
            fault::CHARGE_WHOLE_BATCH => often(Often::Nature(Nature::FailsOnceLate), 20),
            fault::IGNORE_COMMIT_TAG => often(Often::Nature(Nature::Swallows), 15),
            fault::REUSE_AFTER_TRAP => often(Often::Nature(Nature::Trap), 15),
            fault::SKIP_DEAD_LETTER => often(Often::Nature(Nature::Malformed), 15),
            fault::ALLOW_RESERVED_HEADERS => often(Often::Nature(Nature::ReservedHeader), 15),
            fault::TRUST_DUPLICATE => Exposure {
                taken_ids: 20,
                ..Exposure::default()
            },
            // The stranger sends each pointer to another worker, too.
            fault::POINTER_WITHOUT_WORKER => often(Often::Nature(Nature::Redriven), 20),
            // What a host leaves waits until its leases run out.
            fault::LEASES_WITHOUT_INSTANCE => acts(&[(Act::DieWithLeases, 3)]),
            fault::DROP_PAYLOAD_HASH => often(Often::IdReuse, 15),
            "none" => acts(&[
                (Act::Kill, 3),
                (Act::StopDatabase, 3),
                (Act::KillBroker, 2),
                (Act::Cut(Cut::CommitNotForwarded), 4),
                (Act::Cut(Cut::CommitDelayed), 4),
                (Act::Cut(Cut::OutputsNotForwarded), 4),
            ]),
            _ => return None,
        })
    }
}
